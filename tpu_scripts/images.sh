#!/usr/bin/env bash
# images.sh [tpu] [cuda] [sidecar]
# Builds these images (all three when none is named) from this checkout and pushes them as IMAGES/tpu:TAG and so on.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
settings IMAGES TAG
tools docker

((${#REST[@]})) || REST=(tpu cuda sidecar)
for target in "${REST[@]}"; do
    [[ $target =~ ^(tpu|cuda|sidecar)$ ]] || fail 2 "there is no image $target: tpu, cuda or sidecar"
    run docker build --file "$HERE/Dockerfile" --target "$target" --tag "$IMAGES/$target:$TAG" "$(dirname "$HERE")"
    run docker push "$IMAGES/$target:$TAG"
done
