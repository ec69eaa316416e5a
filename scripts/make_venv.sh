#!/usr/bin/env bash
# Make a virtual environment of pinned requirements: make_venv.sh PYTHON DIRECTORY REQUIREMENTS
set -euo pipefail
python=$1 directory=$2 requirements=$3

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lorasweep needs Python 3.11 or later, and $python is $("$python" --version); give one: make PYTHON=python3.12 ..." >&2
    exit 1
}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian and Ubuntu ship Python without it.
    package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing $package ..."
        apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    else
        echo "$python lacks the module venv; install it: sudo apt-get install $package" >&2
        exit 1
    fi
fi

# In a shell with the old environment activated, `python3` is about to be removed.
python=$("$python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')

echo "Installing $requirements into $directory ..."
rm -rf "$directory"
"$python" -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
touch "$directory/installed"
