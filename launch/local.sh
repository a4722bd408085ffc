#!/usr/bin/env bash
# Starts one run as several processes on this machine, each with one GPU. Arguments: PROCESSES, a jaxclip command and
# its arguments.
#   launch/local.sh 4 train --config=configs/pretrain_large_batch.py --workdir=W
# Without this script, one process drives all GPUs; several processes share the work of the host. SIGTERM makes the run
# save and stop.
set -uo pipefail
processes=${1:?usage: launch/local.sh PROCESSES COMMAND [ARGUMENTS]}
command=${2:?usage: launch/local.sh PROCESSES COMMAND [ARGUMENTS]}
shift 2

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((id = 0; id < processes; id++)); do
  CUDA_VISIBLE_DEVICES=$id python -m "jaxclip.$command" "$@" \
    --coordinator_address="localhost:${PORT:-12355}" --num_processes="$processes" --process_id="$id" &
  pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
  while true; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break # a trapped signal interrupts wait while the process still runs
  done
  ((status == 0)) && status=$code
done
exit "$status"
