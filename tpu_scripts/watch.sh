#!/usr/bin/env bash
# watch.sh
# Follows the training that train.sh started: prints what host 0 says, and ends with the run. Exit code 0: the run is
# finished; 1: it failed more than MAX_FAILURES times; 2: its settings are refused. A slice that was preempted is asked for again
# and set up, and the run goes on from its newest checkpoint, up to MAX_RESTARTS times. Sidecars that were stopped are started.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE SIDECARS POLL_SECONDS MAX_RESTARTS MAX_FAILURES
tools gcloud

UNREACHABLE=10 # looks in a row at which a slice that the queue calls active does not answer, until it counts as lost

print_log() { # the lines that were not printed yet
    queue ssh "$NAME" --node=0 --worker=0 \
        --command='sudo journalctl --unit=revseg-train --output=cat --cursor-file=/run/revseg-watch.cursor' || true
}

look() {
    local state
    state=$(queue_state) || { echo unreachable && return; }
    case $state in
        ACTIVE) verdict "$(training_states || true)" ;;
        *) echo "lost ${state:-deleted}" ;;
    esac
}

again() {
    if ! { script create.sh && script setup.sh && script train.sh; }; then
        say "that did not work: another look follows"
    fi
}

start_stopped_sidecars() {
    local name
    ((SIDECARS)) || return 0
    for name in $(run gcloud compute instances list --project="$PROJECT" --zones="$SIDECAR_ZONE" \
        --filter="status=TERMINATED AND name~^$NAME-sidecar-" --format='value(name)'); do
        say "$name was stopped: it is started again"
        run gcloud compute instances start "$name" --project="$PROJECT" --zone="$SIDECAR_ZONE" || true
    done
}

restarts=0 failures=0 unreachable=0
while true; do
    start_stopped_sidecars
    found=$(look)
    [[ ! $DRY_RUN && ($found == unreachable || $found == lost*) ]] || print_log
    [[ ! $DRY_RUN ]] || exit 0
    case $found in
        running) unreachable=0 ;;
        finished) say "the run is finished" && exit 0 ;;
        refused) fail 2 "the trainer refuses its settings: see above" ;;
        failed)
            ((failures < MAX_FAILURES)) || fail 1 "the trainer failed $((failures + 1)) times: see above"
            say "the trainer failed: it is started from its newest checkpoint"
            # A host that does not answer is no fault of the trainer: its slice is on its way out.
            if script train.sh; then ((++failures)); else ((++unreachable)); fi
            ;;
        'lost WAITING_FOR_RESOURCES' | 'lost PROVISIONING' | 'lost CREATING' | 'lost ACCEPTED')
            again
            ;;
        lost*)
            ((++restarts <= MAX_RESTARTS)) || fail 1 "the slice was lost $restarts times"
            say "the slice is gone (${found#lost }): restart $restarts of $MAX_RESTARTS from the newest checkpoint"
            unreachable=0
            again
            ;;
        unreachable) ((++unreachable)) ;;
    esac
    if ((unreachable >= UNREACHABLE)); then
        say "no answer from the slice $unreachable times: it is deleted"
        script delete.sh || true
    fi
    sleep "$POLL_SECONDS"
done
