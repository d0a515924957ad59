#!/usr/bin/env bash
# setup.sh
# Installs the last commit of this checkout on every host of the TPU, as a clone, so that run.json names the revision, and
# copies the sidecars' authority and token there (~/.revseg, readable to that user alone). Started again it brings
# the hosts up to date.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT ZONE SIDECARS
tools gcloud git

bundle=$(bundle_of_this_checkout)
trap 'rm -rf "$(dirname "$bundle")"' EXIT

on_workers 'mkdir -p -m 700 ~/.revseg'
files=("$bundle")
if ((SIDECARS)); then
    [[ $DRY_RUN || -s $SECRETS/token ]] || fail 2 "$SECRETS holds no token: start the sidecars first (sidecar/create.sh)"
    files+=("$SECRETS/ca.crt" "$SECRETS/token")
fi
queue scp "${files[@]}" "$NAME:.revseg/" --node=all --worker=all
# Debian and Ubuntu images of TPU VMs have git.
on_workers 'set -e
chmod 600 ~/.revseg/*
rm -rf ~/revseg_jax
git clone --quiet ~/.revseg/revseg.bundle ~/revseg_jax
~/revseg_jax/tpu_scripts/install.sh ~/.revseg tpu'
say "all hosts are set up"
