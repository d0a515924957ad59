#!/usr/bin/env bash
# gpu/slurm_job.sh
# What gpu/slurm.sh submits; runs on the first node of the job. Starts a sidecar on the last GPU of each node, if
# SLURM_SIDECAR_CHECKPOINT names a checkpoint, then one trainer process a GPU, which find each other by Slurm's variables.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../preemptible.sh
source "$HERE/preemptible.sh"
arguments "$@"
no_arguments
settings REVSEG SECRETS SLURM_GPUS MEMORY_FRACTION COMPILATION_CACHE MAX_RESTARTS
in_checkout
tools srun scancel scontrol openssl
# srun has not taken sbatch's --cpus-per-task since Slurm 22.05.
[[ ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

mapfile -t nodes < <(run scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
if [[ $DRY_RUN ]]; then nodes=(NODES_OF_THE_JOB); fi
tracker=()
if [[ $SLURM_SIDECAR_CHECKPOINT ]]; then
    script secrets.sh localhost "${nodes[@]}"
    run exec srun --overlap --ntasks-per-node=1 --ntasks="${#nodes[@]}" --gpus-per-node="$SLURM_GPUS" \
        "$REVSEG" sidecar --host 0.0.0.0 --port "$PORT" --device "cuda:$((SLURM_GPUS - 1))" \
        --checkpoint "$SLURM_SIDECAR_CHECKPOINT" --tls-certificate "$SECRETS/tls.crt" --tls-key "$SECRETS/tls.key" \
        --token-file "$SECRETS/token" &
    sidecars=$!
    trap 'kill "$sidecars" 2>/dev/null || true' EXIT
    for node in "${nodes[@]}"; do
        until run "$REVSEG" sidecar --check --host "$node" --port "$PORT" --tls-ca "$SECRETS/ca.crt"; do
            kill -0 "$sidecars" || fail 1 "the sidecars did not start: see above"
            sleep 2
        done
    done
    mapfile -t tracker < <(tracker_arguments "$SECRETS" "${nodes[@]}")
fi

# SIGTERM makes srun kill its tasks with SIGKILL: the signal goes to the tasks by Slurm itself. The sidecars, whose step is
# the job's first, stay: the trainers may be waiting for them.
# shellcheck disable=SC2329 # preemptible calls it
pass_on() { scancel --signal=TERM "$SLURM_JOB_ID.$((${#tracker[@]} > 0))"; }
export XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY_FRACTION JAX_COMPILATION_CACHE_DIR=$COMPILATION_CACHE
code=0
run preemptible srun --kill-on-bad-exit=1 \
    "$REVSEG" train "${TRAIN_ARGUMENTS[@]}" "${tracker[@]}" || code=$?
if ((code == 75)); then
    ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || fail 1 "preempted more than $MAX_RESTARTS times"
    say "stopped: the job is queued again"
    run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
