#!/bin/sh
# Makes the environment of `make demo`, `make test` and the like: a virtual environment that holds this checkout
# (editable), what it needs, and the tools of tests and documentation. An installation that was cut off starts again.
#
# Usage, from the root of the checkout: scripts/venv.sh FOLDER [further arguments of pip install]
set -eu

venv=$1
shift
done_mark=$venv/.installed      # made last: newer than setup.py and pyproject.toml means up to date
begun_mark=$venv/.installing    # still there: an installation was cut off

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# `make demo` and `make test` at once: the second waits, and then finds everything done.
if command -v flock >/dev/null 2>&1; then
    exec 9<setup.py
    flock -n 9 || { say "Another installation is running; waiting for it"; flock 9; }
fi
if [ -e "$done_mark" ] && [ -z "$(find setup.py pyproject.toml -newer "$done_mark")" ]; then
    exit 0
fi

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    no_venv=""
    for name in python3 python3.13 python3.12 python3.11; do
        supported "$name" || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            python=$name
            return
        fi
        no_venv=$no_venv${no_venv:-$name}
    done
    [ -z "$no_venv" ] || fail "$no_venv cannot make virtual environments; install its package, e.g." \
        "apt-get install $("$no_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fail "no Python 3.11 to 3.13 was found (python3 is $(python3 --version 2>&1 || true));" \
        "install one, e.g. apt-get install python3 python3-venv"
}

if [ -e "$begun_mark" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    find_python
    [ ! -d "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
        fail "$venv exists and is no virtual environment; remove it, or choose another: make VENV=..."
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
elif ! supported "$venv/bin/python"; then
    fail "$venv has $("$venv/bin/python" --version), but 3.11 to 3.13 is needed; remove $venv and try again"
fi

say "Installing cml_dist and what it needs into $venv: minutes the first time, for PyTorch is large (several GB with CUDA)"
: >"$begun_mark"
began=$(date +%s)
"$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" --editable '.[test,docs]' &
pip=$!
trap 'kill "$pip" 2>/dev/null; wait "$pip" 2>/dev/null; exit 130' INT TERM
passed=0
while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    passed=$((passed + 1))
    [ $((passed % 30)) -ne 0 ] || say "  still installing, $passed s"
done
wait "$pip" || fail "pip could not install (its messages are above); check the network and the free space, then try again"
rm -f "$begun_mark"
: >"$done_mark"
say "Installed in $(($(date +%s) - began)) s"
