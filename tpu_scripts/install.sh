#!/usr/bin/env bash
# install.sh FOLDER EXTRA
# Installs the checkout that this script lies in, with the extra (tpu, cuda or sidecar), into FOLDER/venv of this machine,
# with Python 3.12 and the versions of constraints-312.txt. setup.sh and sidecar/create.sh run it on the machines.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments "$@"
((${#REST[@]} == 2)) || fail 2 "FOLDER and EXTRA are needed (see --help)"
folder=${REST[0]} extra=${REST[1]} source_tree=$(dirname "$HERE")

# The images of the machines bring an older Python than 3.11; uv brings its own.
export UV_PYTHON_INSTALL_DIR=$folder/python # not the home folder, which services may not read
run sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
run sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3-venv git
run python3 -m venv "$folder/uv"
run "$folder/uv/bin/pip" install --quiet --upgrade uv
run "$folder/uv/bin/uv" venv --quiet --allow-existing --python 3.12 "$folder/venv"
run env SAM2_BUILD_CUDA=0 "$folder/uv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" \
    --constraint "$source_tree/constraints-312.txt" --editable "${source_tree}[$extra]"
