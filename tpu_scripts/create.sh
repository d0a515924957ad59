#!/usr/bin/env bash
# create.sh
# Asks for the TPU slice as a queued resource (spot or on demand) and waits until it is there, which may take hours. Started
# again it goes on waiting; one that was preempted or failed is deleted and asked for anew.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE NETWORK ACCELERATOR RUNTIME SLICES SPOT POLL_SECONDS
tools gcloud

request() {
    local shape=(--accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --network="$NETWORK")
    if ((SLICES > 1)); then
        shape+=(--node-count="$SLICES" --node-prefix="$NAME")
    else
        shape+=(--node-id="$NAME")
    fi
    if [[ $SPOT == yes ]]; then shape+=(--spot); fi
    if [[ $SERVICE_ACCOUNT ]]; then shape+=(--service-account="$SERVICE_ACCOUNT"); fi
    queue create "$NAME" "${shape[@]}" --async
}

requested=
while state=$(queue_state) && [[ $state != ACTIVE ]]; do
    case ${state:-none}${requested:+ requested} in
        none)
            request
            requested=yes
            [[ ! $DRY_RUN ]] || exit 0
            ;;
        'FAILED requested')
            fail 1 "the request failed: $(queue describe "$NAME" --format='value(state.failedData.error.message)')"
            ;;
        FAILED* | SUSPENDED* | SUSPENDING*)
            say "the former request is $state: it is deleted"
            script delete.sh
            requested=
            ;;
    esac
    say "waiting: it was ${state:-not in the queue}"
    sleep "$POLL_SECONDS"
done
[[ $state == ACTIVE ]] || fail 1 "the queue cannot be read"
say "$ACCELERATOR is there"
