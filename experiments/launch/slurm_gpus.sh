#!/usr/bin/env bash
# A jaxdpo command on the GPUs of several nodes under SLURM, one process for each GPU; the processes find each other.
#
#   sbatch --nodes=2 experiments/launch/slurm_gpus.sh dpo --model MODEL --data DATA --output-dir DIR
#
# VENV is the environment with jaxdpo[cuda], by default .venv where sbatch is called; it, --output-dir and --data are on
# a file system that every node sees. Set --gpus-per-node and --ntasks-per-node to the GPUs of a node, both alike.
#SBATCH --job-name=jaxdpo
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
: "${1:?a jaxdpo command is missing, such as: dpo --model MODEL --data DATA --output-dir DIR}"

# Not --gpus-per-task: each process has to see all GPUs of its node, of which jax gives it the one of its own number.
status=0
srun --kill-on-bad-exit=0 "${VENV:-.venv}/bin/jaxdpo" "$@" || status=$?

# SIGTERM comes five minutes before the time is up (--signal): the run is saved, and goes on in the next allocation.
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
