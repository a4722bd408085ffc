#!/usr/bin/env bash
# Submits a run to GKE as a JobSet on GPUs or TPU slices. Arguments: gpu or tpu, then the arguments of jaxclip.train.
#   IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/jaxclip CLAIM=shared NODES=4 launch/gke.sh gpu --config=... --workdir=/shared/W
# VARIABLES are environment variables of the pods, quoted as for a shell: VARIABLES="NCCL_DEBUG=WARN XLA_FLAGS='--a=1 --b=2'"
# If a pod fails or is evicted, all pods restart and the run resumes from its newest checkpoint.
set -euo pipefail
kind=${1:?usage: launch/gke.sh gpu|tpu [ARGUMENTS OF jaxclip.train]}
shift
: "${IMAGE:?set it to the image built from launch/Dockerfile}"
: "${CLAIM:?set it to a ReadWriteMany volume claim, which is mounted at /shared}"
export IMAGE CLAIM NAME="${NAME:-jaxclip}" NODES="${NODES:-2}" RESTARTS="${RESTARTS:-20}"
export GPUS="${GPUS:-8}" ACCELERATOR="${ACCELERATOR:-}" TOPOLOGY="${TOPOLOGY:-4x4}" CHIPS="${CHIPS:-4}"
export SLICES="${SLICES:-1}" HOST_NETWORK=false
# Several slices communicate over the network of their hosts, without the detour through the pods' own.
[ "$SLICES" = 1 ] || HOST_NETWORK=true
if [ -z "$ACCELERATOR" ]; then
  [ "$kind" = gpu ] && ACCELERATOR=nvidia-h100-80gb || ACCELERATOR=tpu-v5-lite-podslice
fi

# JSON strings are valid YAML, so quoting as JSON keeps each argument whole.
ARGUMENTS=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:])[1:-1])' "$@")
ENVIRONMENT=$(python3 -c '
import json, shlex, sys
for word in shlex.split(sys.argv[1]):
    name, equals, value = word.partition("=")
    if not equals:
        sys.exit(f"VARIABLES: {word!r} is not NAME=VALUE")
    print(", " + json.dumps({"name": name, "value": value}), end="")
' "${VARIABLES:-}")
export ARGUMENTS ENVIRONMENT
template=$(dirname "$0")/jobset_$kind.yaml
python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ))' <"$template" |
  kubectl apply -f -
