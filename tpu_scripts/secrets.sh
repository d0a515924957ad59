#!/usr/bin/env bash
# secrets.sh HOST...
# Makes what sidecars and trainer need to trust each other, in the folder SECRETS: an authority (ca.crt, ca.key) and a token,
# both made once and kept, and a certificate of that authority for the hosts (tls.crt, tls.key), made anew each time.
# The sidecars get tls.crt, tls.key and token; the trainer gets ca.crt and token; ca.key stays here.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
((${#REST[@]})) || fail 2 "which hosts is the certificate for? (see --help)"
settings SECRETS
tools openssl

umask 077
key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
run mkdir -p "$SECRETS"
if [[ ! -s $SECRETS/ca.crt ]]; then
    run openssl req -x509 "${key[@]}" -days 365 -subj "/CN=revseg authority" \
        -keyout "$SECRETS/ca.key" -out "$SECRETS/ca.crt"
fi
if [[ ! -s $SECRETS/token ]]; then
    run openssl rand -hex -out "$SECRETS/token" 32
fi
names=$(printf ',DNS:%s' "${REST[@]}")
run openssl req -x509 "${key[@]}" -days 365 -subj "/CN=revseg sidecar" -addext "subjectAltName=${names#,}" \
    -addext "basicConstraints=critical,CA:FALSE" -CA "$SECRETS/ca.crt" -CAkey "$SECRETS/ca.key" \
    -keyout "$SECRETS/tls.key" -out "$SECRETS/tls.crt"
