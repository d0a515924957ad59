#!/usr/bin/env bash
# gke/xpk.sh
# Starts the trainer in a cluster made by xpk (Google's Accelerated Processing Kit): the same image and arguments as gke/train.sh,
# without its manifest. xpk mounts no secrets, so the run must do without sidecars (SIDECARS=0, rewards.mask=0).
# The cluster:  xpk cluster create --cluster=CLUSTER --tpu-type=ACCELERATOR --num-slices=SLICES --spot
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE CLUSTER ACCELERATOR SLICES IMAGES TAG MAX_RESTARTS SIDECARS GRACE_SECONDS
tools xpk
((SIDECARS == 0)) || fail 2 "xpk mounts no secrets for sidecars: use gke/train.sh, or set SIDECARS=0 and rewards.mask=0"

run xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --tpu-type="$ACCELERATOR" --num-slices="$SLICES" --docker-image="$IMAGES/tpu:$TAG" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1,75 --termination-grace-period-seconds="$GRACE_SECONDS" \
    --env="JAX_COMPILATION_CACHE_DIR=$COMPILATION_CACHE" \
    --command="preemptible.sh revseg train ${TRAIN_ARGUMENTS[*]@Q}"
