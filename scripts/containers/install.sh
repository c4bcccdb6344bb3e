#!/bin/bash
# Inside a container that is being built: the pinned packages, the accelerator plugin of the same JAX, and twinsim, in /opt/venv.
#   install.sh cuda13 | rocm7
set -euo pipefail
accelerator=${1:?cuda13 or rocm7}
source=/opt/twinsim

python3.12 -m venv /opt/venv
pip=(/opt/venv/bin/python -m pip install --no-cache-dir --quiet)
pinned=$source/requirements/py312.txt
"${pip[@]}" --require-hashes -r "$pinned"
jax=$(sed -n 's/^jax==\([0-9.]*\).*/\1/p' "$pinned")

# names and versions of what is pinned, without hashes: a constraint, so that the plugin brings no other JAX
constraints=$(mktemp)
grep -oE '^[A-Za-z0-9_.-]+==[^ ;\\]+' "$pinned" > "$constraints"
case $accelerator in
cuda13) "${pip[@]}" -c "$constraints" "jax[cuda13]==$jax" ;;
rocm7) # the plugins are released less often than JAX: the newest of the same minor version
    "${pip[@]}" -c "$constraints" "jax-rocm7-plugin==${jax%.*.*}.*" "jax-rocm7-pjrt==${jax%.*.*}.*" ;;
*)
    echo "install.sh: expected cuda13 or rocm7, got $accelerator" >&2
    exit 2
    ;;
esac
"${pip[@]}" --no-deps --no-build-isolation "$source"
rm -f "$constraints"
chmod -R a+rX /opt/venv "$source"
