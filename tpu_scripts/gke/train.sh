#!/usr/bin/env bash
# gke/train.sh
# Starts the sidecars (a StatefulSet) and the trainer (a JobSet) in the GKE cluster that kubectl points to. Certificate and token
# are made here and stored as secrets: revseg-sidecar-tls and revseg-sidecar-token for the sidecars, NAME-trainer (authority and
# token) for the trainer. The sidecars' addresses are the stable names sidecar-0.sidecar, sidecar-1.sidecar. Kubernetes
# starts the trainer again after a preemption. Then:
#   kubectl logs --follow job/NAME-slice-0       what the hosts of slice 0 say
#   kubectl delete jobset NAME                   ends the run; its folder stays
#   kubectl delete statefulset sidecar           ends the sidecars
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings NAME NAMESPACE KUBERNETES_ACCOUNT IMAGES TAG SIDECARS SECRETS GKE_ACCELERATOR GKE_TOPOLOGY GKE_HOSTS GKE_CHIPS
tools kubectl openssl

kube() { run kubectl --namespace="$NAMESPACE" "$@"; }

apply() { # a manifest from stdin
    if [[ $DRY_RUN ]]; then cat >&3; fi
    kube apply --filename=-
}

secret() { # NAME FILES...: made anew, or changed
    local files=()
    for file in "${@:2}"; do files+=(--from-file="$SECRETS/$file"); done
    run kubectl --namespace="$NAMESPACE" create secret generic "$1" "${files[@]}" --dry-run=client --output=yaml | apply
}

hosts=()
for ((number = 0; number < SIDECARS; number++)); do hosts+=("sidecar-$number.sidecar"); done
if ((SIDECARS)); then
    script secrets.sh localhost "${hosts[@]}"
    secret revseg-sidecar-tls tls.crt tls.key ca.crt
    secret revseg-sidecar-token token
    secret "$NAME-trainer" ca.crt token
    # shellcheck disable=SC2034 # with_values reads it
    checkpoint=${SIDECAR_CHECKPOINT##*/}
    with_values "$HERE/sidecar/kubernetes.yaml" SIDECARS IMAGES TAG checkpoint | apply
fi

mapfile -t tracker < <(tracker_arguments /run/sidecar "${hosts[@]}")
ARGUMENTS=$(printf ', "%s"' train "${TRAIN_ARGUMENTS[@]}" "${tracker[@]}")
ARGUMENTS="[${ARGUMENTS#, }]"
with_values "$HERE/gke/jobset.yaml" NAME NAMESPACE MAX_RESTARTS SLICES GKE_HOSTS KUBERNETES_ACCOUNT GRACE_SECONDS \
    GKE_ACCELERATOR GKE_TOPOLOGY IMAGES TAG ARGUMENTS COMPILATION_CACHE GKE_CHIPS | apply
