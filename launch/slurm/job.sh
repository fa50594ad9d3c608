#!/bin/bash
# What the batch scripts share; runs on the job's first node alone. Starts node.sh on every node, and puts a run that
# was stopped and saved back into the queue.
# Arguments: options for srun, --, CONFIG and key=value overrides. Settings: the batch script's environment; besides,
# MAX_REQUEUES (200), after which a job ends with code 75 instead.
# Exit code: 0 finished; 75 stopped and saved, where the job may not be requeued (submit it again); else failed.
set -euo pipefail
options=()
while [ "$1" != -- ]; do options+=("$1") && shift; done
shift
if [ "$MAX_RESTARTS" -lt 1 ]; then # a launcher that never restarts takes a run that was stopped for one that failed
    echo "error: MAX_RESTARTS is $MAX_RESTARTS; set it to 1 or more in the batch script" >&2
    exit 2
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch since SLURM 22.05

# scancel, pre-emption and the time limit send SIGTERM to this shell too, which must live on to see how the step ends:
# bash runs the trap after srun. Signals are answered by node.sh.
trap 'echo "Job $SLURM_JOB_ID was told to end"' TERM
# Whether another node of the job gives no sign of life; SLURM takes minutes to see that it is DOWN. For node.sh too.
node_is_lost() {
    local n=$SLURM_JOB_NUM_NODES probe=(srun --overlap --mem=0 --gres=none --input=none)
    "${probe[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" true &&
        ! timeout --kill-after=10 60 "${probe[@]}" --nodes="$n" --ntasks="$n" true
}
export -f node_is_lost
# What differs from node to node is found by node.sh: expanded here, each node would be node 0.
node=$(<"$LAUNCH/slurm/node.sh") # as text: a container need not have the file
code=0 id=$SLURM_JOB_ID
# srun's --wait: so many seconds after one node has ended it ends the others, and no longer waits for one that is lost.
export SLURM_WAIT=${SLURM_WAIT:-60}
# "${options[@]}" alone is an error in bash before 4.4 where there are none.
srun --kill-on-bad-exit=1 ${options[@]+"${options[@]}"} bash -c "$node" node.sh "$@" || code=$?
# The first task of an array has the number of the whole array, and would requeue all of it.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [ "$code" -ne 0 ]; then
    echo "error: job $id: its step ended with code $code; the reason stands above" >&2
    node_is_lost || exit "$code" # else no fault of the run
else
    # In order: finished, or stopped. The run folder knows; where a run was stopped before it began, there may be none.
    # Options of srun may name a container, where Python is.
    check=("$PYTHON" -m cml_dist status "$RUN_DIR" --check)
    [ ${#options[@]} -eq 0 ] || check=(srun --nodes=1 --ntasks=1 "${options[@]}" "${check[@]}")
    said=$("${check[@]}") || code=$?; echo "$said"
    case $code in 0) exit 0 ;; 1 | 3 | 75) ;; *) exit "$code" ;; esac
    if [[ $said = *": unknown"* && ${SLURM_RESTART_COUNT:-0} -ge 2 ]]; then
        echo "error: job $id: three steps ended in order, but $RUN_DIR has no run; put it where all nodes see it" >&2
        exit "$code"
    fi
fi
# At pre-emption a job still runs. What a user cancelled stays so: scontrol would bring it back.
case $(squeue --noheader --jobs="$id" --format='%T %r') in RUNNING* | *TimeLimit) ;; *) exit 75 ;; esac
# A job whose time ends before its first step would come back for ever.
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-200}" ]; then
    echo "error: job $id was requeued $SLURM_RESTART_COUNT times; see whether its runs get on, then submit it again" >&2
    exit 75
fi
scontrol requeue "$id" || exit 75
echo "Job $id goes back into the queue, to go on from its checkpoint"
