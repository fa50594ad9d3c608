#!/bin/bash
# Runs once on each node, started by srun (job.sh): this node's processes, and SLURM's signals for them.
# Arguments: CONFIG and key=value overrides. Settings: the batch script's environment; besides, REJOIN_S (45): so long
# a node whose processes have ended waits for the other nodes to start again with it.
set -euo pipefail

# SLURM_NODEID is this node's own only here, inside srun. The address: the name of the step's first node, by hand since
# containers have no scontrol: rack[1-2]n[03,05],x7 -> rack1n03.
nodes=$SLURM_STEP_NUM_NODES
processes=$((nodes * PROCESSES_PER_NODE)) # parallel.processes below has the run refuse any other world
first=$SLURM_STEP_NODELIST
while [[ $first =~ ^([^],]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
    first=${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}
done
command=(accelerate.commands.launch --config_file "$LAUNCH/accelerate/$ACCELERATE_FILE"
    --num_machines "$nodes" --num_processes "$processes" --max_restarts "$MAX_RESTARTS")
if [ "$nodes" -gt 1 ]; then
    # A port of the job and of this start of it: what an earlier start left on a lost node must not be met.
    port=$((15000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 15000))
    command+=(--machine_rank "$SLURM_NODEID" --main_process_ip "${first%%,*}" --main_process_port "$port"
        --rdzv_backend c10d)
fi

# SLURM signals this shell alone. The processes must hear of it, and not the launcher: it would kill them 30 s later,
# and a meta-step may take minutes. The first variable is for sites that signal all processes (newer torch heeds it).
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT LOGLEVEL="${LOGLEVEL:-ERROR}"
trap '' USR1 USR2 TERM # inherited: a process that is not up yet ignores them
"$PYTHON" -m "${command[@]}" -m cml_dist train "$@" "run.dir=$RUN_DIR" "parallel.processes=$processes" &
launcher=$!
stopping=
trap 'stopping=yes REJOIN_S=300' USR1 USR2 TERM # who is stopped and saved leaves with 0; others may still import
# shellcheck disable=SC2086 # one word a process
in_proc() { printf "/proc/%s/$1 " $children; } # the file of that name of each child of the launcher
met='' seen=0
# shellcheck disable=SC2046,SC2086 # one word a process
while kill -0 "$launcher" 2>/dev/null; do
    children=$(cat /proc/"$launcher"/task/*/children 2>/dev/null) || true
    [ -z "$stopping" ] || kill -USR1 $children 2>/dev/null || true # each second: a process may just be starting
    # A launcher that asks a lost node does not bury its dead.
    if grep -qs '^State:.[^XZ]' $(in_proc status); then
        seen=$SECONDS
        # What the launcher itself asks for (nvidia-smi, say) is no process of the run.
        [ -n "$met" ] || ! grep -qzs '^TORCHELASTIC_RUN_ID=' $(in_proc environ) || met=yes
    elif [ -n "$met" ] && [ "$nodes" -gt 1 ] && [ $((SECONDS - seen)) -ge "${REJOIN_S:-45}" ]; then
        # torch has one time for this and for the first start, when a node may come late.
        echo "error: ${SLURMD_NODENAME:-$HOSTNAME}: the other nodes did not come back within ${REJOIN_S:-45} s" >&2
        kill -KILL "$launcher"
        exit 1
    elif [ "$SLURM_NODEID$met" = 0 ] && [ "$nodes" -gt 1 ] && [ $((SECONDS - seen)) -ge 60 ]; then
        seen=$SECONDS # the first node asks each minute; a container has no srun
        if type srun &>/dev/null && node_is_lost; then
            echo "error: a node was lost before the run began" >&2
            kill -KILL "$launcher"
            exit 1
        fi
    fi
    sleep 1
done
wait "$launcher"
