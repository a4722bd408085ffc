#!/usr/bin/env bash
# Starts a run on all hosts of a Cloud TPU slice, each with jaxclip installed. Arguments are passed to jaxclip.train.
#   TPU=my-slice ZONE=us-west4-a launch/tpu_vm.sh --config=configs/pretrain_large_batch.py --workdir=/shared/W
# SETUP (default: . venv/bin/activate) runs on every host first. /shared is a file system that all hosts mount.
set -euo pipefail
: "${TPU:?set it to the name of the TPU}" "${ZONE:?set it to the zone of the TPU}" "${SETUP:=. venv/bin/activate}"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="$SETUP && JAXCLIP_CACHE=${JAXCLIP_CACHE:-/shared/cache} exec python -m jaxclip.train $(printf '%q ' "$@")"
