#!/usr/bin/env bash
# sidecar/create.sh
# Creates the SIDECARS machines with a GPU, installs the last commit of this checkout and SIDECAR_CHECKPOINT there, and starts
# the sidecar as the systemd unit revseg-sidecar, which comes back with the machine. Their addresses are the names that Google's
# internal DNS gives them, NAME-sidecar-0.ZONE.c.PROJECT.internal, so train.sh knows them without asking. Certificate and
# token are made by secrets.sh on this machine and copied over ssh. Started again it brings the machines up to date.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
arguments "$@"
no_arguments
settings NAME PROJECT SIDECARS SIDECAR_ZONE SIDECAR_MACHINE SIDECAR_CHECKPOINT SECRETS NETWORK POLL_SECONDS
tools gcloud git openssl
((SIDECARS)) || fail 2 "SIDECARS is 0 in $SETTINGS"

mapfile -t machines < <(sidecar_names)
hosts=(localhost)
for machine in "${machines[@]}"; do hosts+=("$(sidecar_host "$machine")"); done
where=(--project="$PROJECT" --zone="$SIDECAR_ZONE")

there=$(run gcloud compute instances list --project="$PROJECT" --zones="$SIDECAR_ZONE" \
    --filter="name~^$NAME-sidecar-" --format='value(name)')
missing=()
for machine in "${machines[@]}"; do [[ $'\n'$there$'\n' == *$'\n'"$machine"$'\n'* ]] || missing+=("$machine"); done
if ((${#missing[@]})); then
    shape=(--machine-type="$SIDECAR_MACHINE" --network="$NETWORK" --maintenance-policy=TERMINATE --boot-disk-size=100GB
        --image-family="$SIDECAR_IMAGE_FAMILY" --image-project="$SIDECAR_IMAGE_PROJECT"
        --metadata=install-nvidia-driver=True --scopes=cloud-platform)
    if [[ $SIDECAR_SPOT == yes ]]; then shape+=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
    if [[ $SERVICE_ACCOUNT ]]; then shape+=(--service-account="$SERVICE_ACCOUNT"); fi
    run gcloud compute instances create "${missing[@]}" "${where[@]}" "${shape[@]}"
fi

script secrets.sh "${hosts[@]}"
bundle=$(bundle_of_this_checkout)
trap 'rm -rf "$(dirname "$bundle")"' EXIT
for machine in "${machines[@]}"; do
    attempts=0
    until run gcloud compute ssh "$machine" "${where[@]}" --command=true; do
        ((++attempts < 20)) || fail 1 "$machine does not answer over ssh"
        say "$machine does not answer yet"
        sleep "$POLL_SECONDS"
    done
    run gcloud compute ssh "$machine" "${where[@]}" --command='mkdir -p -m 700 ~/.revseg'
    run gcloud compute scp "$bundle" "$SECRETS/ca.crt" "$SECRETS/tls.crt" "$SECRETS/tls.key" "$SECRETS/token" \
        "$machine:.revseg/" "${where[@]}"
    run gcloud compute ssh "$machine" "${where[@]}" --command="set -e
sudo install -d -m 755 /etc/revseg /opt/revseg
sudo mv ~/.revseg/{ca.crt,tls.crt,tls.key,token} /etc/revseg/
sudo chown root:root /etc/revseg/* && sudo chmod 600 /etc/revseg/{tls.key,token}
sudo chmod 644 /etc/revseg/{ca.crt,tls.crt}
sudo rm -rf /opt/revseg/revseg_jax
sudo git clone --quiet ~/.revseg/revseg.bundle /opt/revseg/revseg_jax
sudo /opt/revseg/revseg_jax/tpu_scripts/install.sh /opt/revseg sidecar
sudo ln -sfn /opt/revseg/venv/bin /opt/revseg/bin
[[ -s /etc/revseg/${SIDECAR_CHECKPOINT##*/} ]] || sudo gcloud storage cp ${SIDECAR_CHECKPOINT@Q} /etc/revseg/
sed 's#/etc/revseg/sam2.1_hiera_large.pt#/etc/revseg/${SIDECAR_CHECKPOINT##*/}#' \\
    /opt/revseg/revseg_jax/tpu_scripts/sidecar/revseg-sidecar.service | sudo tee /etc/systemd/system/revseg-sidecar.service >/dev/null
sudo systemctl daemon-reload && sudo systemctl enable --quiet revseg-sidecar && sudo systemctl restart revseg-sidecar
timeout 300 sh -c 'until /opt/revseg/bin/revseg sidecar --check --host localhost --tls-ca /etc/revseg/ca.crt; do sleep 5; done'"
    say "$(sidecar_host "$machine"):$PORT serves"
done
