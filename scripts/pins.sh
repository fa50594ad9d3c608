#!/bin/sh
# Writes constraints.txt anew: the newest versions of all that the container image holds, as pip resolves them today.
# Nothing is installed. Needs Python 3.11 (PYTHON=... where it has another name); review the difference before a commit.
#
# Usage, from the root of the checkout: scripts/pins.sh [further arguments of pip install]
set -eu

python=${PYTHON:-python3.11}
[ -e setup.py ] || { echo "error: no setup.py here; run scripts/pins.sh from the root of the checkout" >&2; exit 1; }
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv/venv"
"$venv/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" --dry-run --ignore-installed \
    --report "$venv/report.json" pip setuptools '.[trackers]'
"$venv/venv/bin/python" - "$venv/report.json" >"$venv/constraints.txt" <<'EOF'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    report = json.load(file)
chosen = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}
del chosen["cml-dist"]
environment = report["environment"]
print(f"""\
# What the container image installs, to the version: resolved for Python {environment["python_version"]} on
# {environment["sys_platform"]} {environment["platform_machine"]}. Written by scripts/pins.sh, which makes it anew.
# As constraints, they also fit builds of PyTorch without CUDA: what these do not need is not installed.""")
for name, version in sorted(chosen.items()):
    print(f"{name}=={version.partition('+')[0]}")  # torch 2.14.1 admits 2.14.1+cpu, and not the other way round
EOF
mv "$venv/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
