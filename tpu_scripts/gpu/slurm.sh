#!/usr/bin/env bash
# gpu/slurm.sh
# Submits the training to Slurm: SLURM_NODES nodes with SLURM_GPUS GPUs, one process a GPU. This checkout, in which the
# job runs and from which relative paths in the settings count, the settings file, SECRETS and the paths in
# TRAIN_ARGUMENTS must be on a file system that the nodes share. Before its time is over, and when it is preempted, the
# run is saved; then it is queued again and goes on.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings NAME SLURM_NODES SLURM_GPUS SLURM_TIME GRACE_SECONDS
tools sbatch

settings_file=$(realpath "$SETTINGS")
# exec: the signal goes to the job's shell, which must be the script itself.
run sbatch --job-name="$NAME" --nodes="$SLURM_NODES" --ntasks-per-node="$SLURM_GPUS" --gpus-per-node="$SLURM_GPUS" \
    --time="$SLURM_TIME" --requeue --open-mode=append --signal="B:TERM@$GRACE_SECONDS" "${SLURM_ARGUMENTS[@]}" \
    --wrap="exec ${HERE@Q}/gpu/slurm_job.sh --settings ${settings_file@Q}"
