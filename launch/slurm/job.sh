#!/bin/bash
# What the batch scripts share; runs on the job's first node alone. Starts node.sh on every node, and puts a run that
# was stopped and saved back into the queue.
# Arguments: options for srun, --, CONFIG and key=value overrides. Settings: the batch script's environment.
# Exit code: 0 finished; 75 stopped and saved, where the job may not be requeued (submit it again); else failed.
set -euo pipefail
options=()
while [ "$1" != -- ]; do options+=("$1") && shift; done
shift
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch since SLURM 22.05

# scancel, pre-emption and the time limit send SIGTERM to this shell too, which must live on to see how the step ends:
# bash runs the trap after srun. Signals are answered by node.sh.
trap 'echo "Job $SLURM_JOB_ID was told to end"' TERM
# What differs from node to node is found by node.sh: expanded here, each node would be node 0.
node=$(<"$LAUNCH/slurm/node.sh") # as text: a container need not have the file
code=0
srun --kill-on-bad-exit=1 "${options[@]}" bash -c "$node" node.sh "$@" || code=$?
if [ "$code" -ne 0 ]; then
    echo "error: job $SLURM_JOB_ID: its step ended with code $code; the reason stands above" >&2
    exit "$code"
fi

id=$SLURM_JOB_ID
# The first task of an array has the number of the whole array, and would requeue all of it.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# The step ended in order: finished, or stopped. The run folder knows; where a run was stopped before it began, there
# may be none. Options of srun may name a container, where Python is.
check=("$PYTHON" -m cml_dist status "$RUN_DIR" --check)
[ ${#options[@]} -eq 0 ] || check=(srun --nodes=1 --ntasks=1 "${options[@]}" "${check[@]}")
"${check[@]}" || code=$?
case $code in 0) exit 0 ;; 1 | 3 | 75) ;; *) exit "$code" ;; esac
# At pre-emption a job still runs. What a user cancelled stays so: scontrol would bring it back.
case $(squeue --noheader --jobs="$id" --format='%T %r') in RUNNING* | *TimeLimit) ;; *) exit 75 ;; esac
scontrol requeue "$id" || exit 75
echo "Job $id goes back into the queue, to go on from its checkpoint"
