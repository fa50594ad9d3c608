#!/usr/bin/env bash
# Train a recipe on this machine, on all its GPUs, or on the CPU where there is none: from a checkout, nothing installed
# but the environment of `make demo` (or any that has cml_dist's requirements). See --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: launch/quickstart.sh RECIPE [key=value ...]

Trains RECIPE, a name in configs/recipes or a YAML file, with one process for each GPU of this machine, or with two on
the CPU where it has none. Settings are handed on: run.dir=runs/mine train.steps=100. The same command resumes the run.

Environment:
  CML_PYTHON      the Python to use (default: that of the active environment, else .venv of the checkout, else python3)
  CML_PROCESSES   how many processes (default: all GPUs that CUDA_VISIBLE_DEVICES leaves, or 2)
  CML_LAUNCH      a file of launch/accelerate by name, such as zero2 (default: ddp on GPUs, cpu without)
HELP
}

fail() {
    echo "error: $*" >&2
    exit 2
}

case ${1:-} in
    -h | --help) usage; exit ;;
    "") usage >&2; exit 2 ;;
    -* | *=*) fail "the first argument is the recipe, not $1; see launch/quickstart.sh --help" ;;
esac
recipe=$1
shift

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${CML_PYTHON:-}
if [ -z "$python" ]; then
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x "$root/.venv/bin/python" ]; then
        python=python3
    else
        python=$root/.venv/bin/python
    fi
fi
# The checkout's own cml_dist, from whatever folder this is called. The count, or the reason, in one line.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
gpus=$("$python" -c 'import accelerate, pydantic, torch; print(torch.cuda.device_count())' 2>&1 | tail -n 1) || true
[[ $gpus =~ ^[0-9]+$ ]] || fail "$python cannot run cml_dist ($gpus); run make demo once, or pip install $root"

if [ "$gpus" -gt 0 ]; then file=ddp processes=$gpus; else file=cpu processes=2; fi
file=${CML_LAUNCH:-$file} processes=${CML_PROCESSES:-$processes}
[ -f "$root/launch/accelerate/$file.yaml" ] || fail "launch/accelerate has no $file.yaml (CML_LAUNCH)"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "CML_PROCESSES is $processes, which is no number of processes"
"$python" -m cml_dist config "$recipe" "$@" > /dev/null || exit 2

if [ "$gpus" = 0 ]; then place="the CPU (no GPU here)"; elif [ "$processes" = 1 ]; then place="a GPU"; else place=GPUs; fi
echo "$recipe: $processes process$([ "$processes" = 1 ] || echo es) on $place"
export LOGLEVEL=${LOGLEVEL:-ERROR} # of the launcher, whose own lines say nothing new
# The command accelerate-launch: that of `accelerate launch` imports timm and transformers first, for seconds.
exec "$python" -m accelerate.commands.launch --config_file "$root/launch/accelerate/$file.yaml" \
    --num_processes "$processes" -m cml_dist train "$recipe" "parallel.processes=$processes" "$@"
