#!/usr/bin/env bash
# sidecar/delete.sh
# Deletes the sidecars' machines with their disks. Certificates and token stay in SECRETS.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT SIDECARS SIDECAR_ZONE
tools gcloud
((SIDECARS)) || fail 2 "SIDECARS is 0 in $SETTINGS"

mapfile -t machines < <(sidecar_names)
run gcloud compute instances delete "${machines[@]}" --project="$PROJECT" --zone="$SIDECAR_ZONE" --quiet
