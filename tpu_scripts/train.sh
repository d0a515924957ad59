#!/usr/bin/env bash
# train.sh
# Starts `revseg train` with TRAIN_ARGUMENTS on every host of the TPU, as a systemd unit: it does not need this machine any
# more, and a preemption's SIGTERM lets it save. A run that has a checkpoint goes on from it. Does nothing where it runs
# already; what is left of a start that failed on some hosts is stopped first. watch.sh follows it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE SIDECARS GRACE_SECONDS TRAIN_ARGUMENTS
tools gcloud

if [[ $(verdict "$(training_states)") == running ]]; then
    say "it is running already: watch.sh follows it"
    exit 0
fi
hosts=()
for name in $(sidecar_names); do hosts+=("$(sidecar_host "$name")"); done
# The settings' words are quoted for the shell over there, which is to replace $HOME in the sidecars' alone.
# shellcheck disable=SC2016
mapfile -t tracker < <(tracker_arguments '$HOME/.revseg' "${hosts[@]}")
words="${TRAIN_ARGUMENTS[*]@Q}"
for word in "${tracker[@]}"; do words+=" \"$word\""; done

on_workers "sudo systemctl stop revseg-train 2>/dev/null; sudo systemctl reset-failed revseg-train 2>/dev/null
cd ~/revseg_jax && sudo systemd-run --quiet --unit=revseg-train --uid=\$(id -un) --working-directory=\$PWD \\
    --property=RemainAfterExit=yes --property=KillMode=mixed --property=TimeoutStopSec=$GRACE_SECONDS \\
    --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
    --setenv=HOME=\$HOME --setenv=JAX_COMPILATION_CACHE_DIR=${COMPILATION_CACHE@Q} \\
    ./tpu_scripts/preemptible.sh ~/.revseg/venv/bin/revseg train $words"
say "started on all hosts"
