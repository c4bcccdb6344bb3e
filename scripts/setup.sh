#!/bin/sh
# Makes .venv: the pinned requirements, checked by their hashes, and this checkout installed in place.
# `make` calls it; by hand: [PYTHON=/path/to/python3.12] [UV=no] scripts/setup.sh
set -eu
cd "$(dirname "$0")/.."

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
fast() { [ "${UV:-uv}" != no ] && "${UV:-uv}" --version >/dev/null 2>&1; }

if ! recent .venv/bin/python; then
    python=
    for name in ${PYTHON:-python3.12 python3.11 python3 python3.14 python3.13 /usr/bin/python3}; do
        # a name can exist and still refuse to run (pyenv), or come without venv (Debian): try, do not look
        if recent "$name" && { fast || "$name" -c 'import ensurepip' 2>/dev/null; }; then
            python=$("$name" -c 'import sys; print(sys.executable)')
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "twinsim needs Python 3.11 or newer with its venv module; none of these is one: ${PYTHON:-python3.12 python3.11 python3 python3.14 python3.13}" >&2
        echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
    rm -rf .venv
    if fast; then "${UV:-uv}" venv -q --python "$python" .venv; else "$python" -m venv .venv; fi
fi

case $(.venv/bin/python -c 'import sys; print(sys.version_info[1])') in
    11) pinned=requirements/py311.txt ;;
    *) pinned=requirements/py312.txt ;; # its hashes cover newer Pythons too
esac
echo "installing $pinned into .venv (about 1 GB)"
if fast && "${UV:-uv}" pip install -q --compile-bytecode --python .venv/bin/python --require-hashes -r "$pinned"; then
    "${UV:-uv}" pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
else # also where uv does not know the mirror that pip is set up for
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install -q --require-hashes -r "$pinned"
    .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e .
fi
touch .venv/.ready
