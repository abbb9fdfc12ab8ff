"""A slurm of shell scripts: a job of two nodes, which are this machine."""

import os
from pathlib import Path

from video_mae.config.world import NAMES

# A job of two nodes on this machine. A requeued one is started again, as its script has ended.
SBATCH = """#!/usr/bin/env bash
export SLURM_JOB_ID=41 SLURM_JOB_NODELIST='node[0-1]' SLURM_JOB_NUM_NODES=2
export SLURM_NTASKS_PER_NODE=${RANKS_OF_NODE:-2} SLURM_RESTART_COUNT=0
while true; do
    bash "$@"
    status=$?
    [[ -e $FAKE/requeued ]] || exit $status
    rm "$FAKE/requeued"
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.2\\n' ;;
    requeue) touch "$FAKE/requeued" ;;
esac
"""
# As srun: a task each with its numbers, lines with the task's number, the highest status.
SRUN = """#!/usr/bin/env bash
tasks=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)) a_node=$SLURM_NTASKS_PER_NODE label=no
while [[ $1 == --* ]]; do
    case $1 in
        --ntasks) tasks=$2 && shift ;;
        --ntasks-per-node) a_node=$2 && shift ;;
        --nodes) shift ;;
        --label) label=yes ;;
    esac
    shift
done
pids=()
for ((task = 0; task < tasks; task++)); do
    export SLURM_PROCID=$task SLURM_LOCALID=$((task % a_node)) SLURM_NODEID=$((task / a_node)) SLURM_STEP_NUM_TASKS=$tasks
    if [[ $label == yes ]]; then
        "$@" > >(sed -u "s/^/$task: /") 2>&1 &
    else
        "$@" &
    fi
    pids+=($!)
done
[[ $label == yes ]] && echo "${pids[@]}" > "$FAKE/pids"
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""
# In place of python -m video_mae: says what it was given; its status is the first line of a file that is used up.
PROGRAM = """#!/usr/bin/env bash
echo "$* at $MASTER_ADDR:$MASTER_PORT, $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, here $SLURM_LOCALID of $LOCAL_WORLD_SIZE"
statuses="$FAKE/statuses_$SLURM_PROCID"
status=$(head -n 1 "$statuses" 2>/dev/null)
sed -i 1d "$statuses" 2>/dev/null
exit "${status:-0}"
"""


def make_slurm(folder: Path) -> dict[str, str]:
    """Scripts in a folder of their own, and the environment in which they are found."""
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "program").write_text(PROGRAM)
    (folder / "program").chmod(0o755)
    # what training in this process has left
    launchers = {*NAMES, "LOCAL_WORLD_SIZE"}
    return {
        **{name: value for name, value in os.environ.items() if name not in launchers},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE": str(folder),
        "PYTHON": str(folder / "program"),
        "LEAST_SECONDS": "0",
        "REQUEUE_SECONDS": "0",
    }
