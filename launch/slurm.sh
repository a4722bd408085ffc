#!/usr/bin/env bash
# Submits a run to SLURM, with one process per GPU. Variables are settings; arguments are passed to jaxclip.train.
#   NODES=4 GPUS=8 TIME=12:00:00 launch/slurm.sh --config=configs/pretrain_large_batch.py --workdir=/shared/W
# Submitting the same command again resumes the run. `singleton` makes jobs with the same NAME run one after the other.
set -euo pipefail
: "${NODES:=2}" "${GPUS:=8}" "${CPUS:=12}" "${TIME:=24:00:00}" "${NAME:=jaxclip}" "${SETUP:=:}"

# Since Slurm 22.05 srun does not take over sbatch's --cpus-per-task (https://slurm.schedmd.com/sbatch.html): without
# SRUN_CPUS_PER_TASK a process may get one CPU, too few to feed a GPU.
exec sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" \
  --cpus-per-task="$CPUS" --time="$TIME" --dependency=singleton --requeue --open-mode=append \
  --output="$NAME-%j.log" --signal=TERM@120 \
  --wrap="$SETUP && export SRUN_CPUS_PER_TASK=$CPUS && exec srun --kill-on-bad-exit=1 --wait=60 python -m jaxclip.train $(printf '%q ' "$@")"
