#!/usr/bin/env bash
# A run on GPU nodes of a SLURM cluster, one task for each GPU:
#
#   sbatch --nodes=8 launch/slurm.sh -m gakd_jax.main \
#     --config=configs/gakd.py --workdir=/shared/runs/gakd
#
# --workdir lies on a file system that all nodes share. Two minutes before its
# time is up, or when the job is preempted, all tasks save and stop at the same
# step, and the job is queued again; so it is after a node has failed.
#SBATCH --job-name=gakd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch $0 -m gakd_jax.main --config=FILE --workdir=DIR" >&2
  exit 2
fi
# Proxies are for the world outside; the tasks must reach each other.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# Waits on its own, so that the shell may take note of signals meanwhile.
srun --kill-on-bad-exit=0 --wait=0 --label "${PYTHON:-python}" "$@" &
step=$!
status=0
# Of the tasks: srun would answer this signal by killing them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true' TERM
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done

case $status in
  0 | 2) exit "$status" ;; # Done; or what starting again cannot put right.
esac
# A job that somebody cancels, or SLURM itself queues again, runs no more.
if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
  exit "$status"
fi
if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-20})); then
  echo "exit $status, and no restart is left" >&2
  exit "$status"
fi
echo "exit $status: queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
