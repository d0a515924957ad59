#!/usr/bin/env bash
# delete.sh
# Deletes the queued resource with its TPUs; nothing is charged for them after that. The run's folder stays. The sidecars'
# machines are deleted by sidecar/delete.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE
tools gcloud

if [[ $DRY_RUN || $(queue_state) ]]; then
    queue delete "$NAME" --force --quiet
else
    say "there is no $NAME"
fi
