# shellcheck shell=bash
# Sourced by the scripts: their arguments, the settings, and commands that --dry-run only prints.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SETTINGS=$HERE/settings.env
DRY_RUN=
PORT=50051 # of sidecars
exec 3>&1  # where --dry-run prints, also when a command's output is captured

fail() { # EXIT_CODE WORDS...: 2 for what the user must change, 1 for what went wrong
    echo "${0##*/}: error: ${*:2}" >&2
    exit "$1"
}

say() { [[ $DRY_RUN ]] || echo "${0##*/}: $*" >&2; }

# The comment at the top of a script is its help.
usage() {
    sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$0"
    printf '\n  --settings FILE  default: %s\n  --dry-run        print the commands, run none\n  --help\n' "$SETTINGS"
}

arguments() { # "$@": takes the options; what is left is in REST
    REST=()
    while (($#)); do
        case $1 in
            --help | -h) usage && exit 0 ;;
            --dry-run) DRY_RUN=yes ;;
            --settings)
                [[ ${2:-} ]] || fail 2 "--settings needs a file"
                SETTINGS=$2
                shift
                ;;
            -*) fail 2 "unknown option $1 (see --help)" ;;
            *) REST+=("$1") ;;
        esac
        shift
    done
}

no_arguments() { ((${#REST[@]} == 0)) || fail 2 "unknown argument ${REST[0]} (see --help)"; }

settings() { # NAMES...: reads the settings, of which these must not be empty
    [[ -f $SETTINGS ]] || fail 2 "settings file $SETTINGS does not exist"
    # shellcheck source=settings.env
    source "$SETTINGS"
    local name
    for name in "$@"; do
        [[ ${!name:-} ]] || fail 2 "$name is empty in $SETTINGS"
    done
}

tools() { # NAMES...: commands that must be on PATH
    local name
    for name in "$@"; do
        [[ $DRY_RUN ]] || command -v "$name" >/dev/null || fail 2 "$name is not on PATH: install it first"
    done
}

in_checkout() { # from here on, relative paths in the settings count from the checkout, wherever the caller is
    SETTINGS=$(realpath "$SETTINGS")
    run cd "$(dirname "$HERE")"
}

run() { # runs a command, or prints it so that a shell reads it back
    if [[ $DRY_RUN ]]; then
        {
            printf '+'
            printf ' %q' "$@"
            printf '\n'
        } >&3
    else
        "$@"
    fi
}

script() { # NAME ARGUMENTS...: another script here, with the same settings
    "$HERE/$1" --settings "$SETTINGS" ${DRY_RUN:+--dry-run} "${@:2}"
}

bundle_of_this_checkout() { # prints the path of a file, in a folder of its own, that holds the last commit
    local checkout file
    checkout=$(dirname "$HERE")
    file=$(mktemp -d)/revseg.bundle
    [[ -z $(git -C "$checkout" status --porcelain) ]] || say "warning: changes that are not committed do not travel"
    run git -C "$checkout" bundle create --quiet "$file" HEAD
    echo "$file"
}

# --- TPU VMs ----------------------------------------------------------------------------------------------------------

queue() { # VERB ARGUMENTS...
    run gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

queue_state() { # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED...; nothing when there is no such request
    queue list --filter="name~/$NAME\$" --format='value(state.state)'
}

on_workers() { # COMMAND: on every host of every slice
    queue ssh "$NAME" --node=all --worker=all --command="$1"
}

# One line a host, such as: ActiveState=active SubState=running ExecMainStatus=0
training_states() {
    # shellcheck disable=SC2016 # for the shell over there
    on_workers 'echo training: $(systemctl show revseg-train -p ActiveState,SubState,ExecMainStatus)' |
        sed -n 's/^.*training: //p'
}

# From these lines to one word for all hosts.
verdict() {
    case $1 in
        *'ExecMainStatus=2' | *'ExecMainStatus=2'[!0-9]*) echo refused ;; # not 203, which is systemd's own
        *ActiveState=failed* | *ActiveState=inactive*) echo failed ;;
        *SubState=running*) echo running ;;
        *SubState=exited*) echo finished ;;
        *) echo unreachable ;;
    esac
}

# --- Sidecars ---------------------------------------------------------------------------------------------------------

sidecar_names() {
    local number
    for ((number = 0; number < SIDECARS; number++)); do echo "$NAME-sidecar-$number"; done
}

sidecar_host() { # NAME: the name that Google's internal DNS gives the machine, known before it exists
    echo "$1.$SIDECAR_ZONE.c.$PROJECT.internal"
}

tracker_arguments() { # FOLDER HOSTS...: a line each; how the trainer reaches them; FOLDER holds ca.crt and token there
    local folder=$1 endpoints
    shift
    (($#)) || return 0
    endpoints=$(printf ",%s:$PORT" "$@")
    printf '%s\n' "tracker.endpoints=[${endpoints#,}]" "tracker.tls_ca=$folder/ca.crt" "tracker.token_file=$folder/token"
}

with_values() { # FILE NAMES...: its text, with ${NAME} replaced by the variable's value
    local text name
    text=$(<"$1")
    for name in "${@:2}"; do text=${text//"\${$name}"/"${!name}"}; done
    printf '%s\n' "$text"
}
