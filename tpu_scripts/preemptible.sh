#!/usr/bin/env bash
# preemptible.sh COMMAND [ARGUMENT...]
# Runs a command and passes SIGTERM (and Ctrl-C, as SIGTERM) on to it. The exit code is the command's, but 75 after a signal: a
# trainer that saved and ended in good order has not finished its run, and who started it must know to start it again.
set -uo pipefail

# Who sources this may have another way to tell the command.
pass_on() { kill -TERM "$1" 2>/dev/null; }

preemptible() {
    local child='' code stopped='' early=''
    trap 'stopped=yes; if [[ $child ]]; then pass_on "$child"; else early=yes; fi' TERM INT
    "$@" &
    child=$!
    [[ $early ]] && pass_on "$child" # the signal came before the child was known
    wait "$child"
    code=$?
    while [[ $stopped ]] && kill -0 "$child" 2>/dev/null; do wait "$child"; done
    trap - TERM INT
    [[ $stopped ]] && return 75
    return "$code"
}

[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0 # sourced for its function
case ${1:-} in
    --help | -h | "") sed -n '2,4s/^# //p' "$0" ;;
    --dry-run) printf '+%s\n' "$(printf ' %q' "${@:2}")" ;;
    *) preemptible "$@" ;;
esac
