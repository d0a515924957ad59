#!/usr/bin/env bash
# gpu/node.sh
# Trains on the GPUs of this machine, in one process. A trainer that needs a sidecar and has no tracker.endpoints in
# TRAIN_ARGUMENTS starts its own on the first GPU, whose memory they share. Relative paths in the settings count from
# this checkout, in which the trainer runs. Ctrl-C or SIGTERM saves and ends with exit code 75; the same command goes on
# from the newest checkpoint, so a service manager may start it again for as long as it does not exit with 0 or 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings REVSEG MEMORY_FRACTION COMPILATION_CACHE
in_checkout
tools "$REVSEG"

export XLA_PYTHON_CLIENT_MEM_FRACTION=$MEMORY_FRACTION JAX_COMPILATION_CACHE_DIR=$COMPILATION_CACHE
run exec "$HERE/preemptible.sh" "$REVSEG" train "${TRAIN_ARGUMENTS[@]}"
