# Sourced by the batch scripts: environment, and running a step so that a warned job is requeued and goes on where it stopped.
set -uo pipefail

[[ -f cli.py ]] || { echo "Error: $PWD has no cli.py: submit from the repository's root, or with --chdir=/path/to/it." >&2; exit 2; }

# Secrets (HF_TOKEN, WANDB_API_KEY) come from the environment or from .env, never from options: those are visible to everybody in squeue.
if [[ -f .env ]]; then set -a; source .env; set +a; fi

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
export PYTHON
# srun takes the job's CPUs per task only from here (since Slurm 22.05).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# run_step COMMAND…: run it and exit as it does. SIGUSR1, which Slurm sends some time before the limit (--signal), reaches the workers; they put
# their work down and the job is requeued. SIGTERM reaches them too, but whoever sends it decides about requeueing: preemption does, scancel not.
run_step() {
    local step code told=""
    trap 'told=USR1; kill -USR1 "$step"' USR1
    trap 'told=TERM; kill -TERM "$step"' TERM
    echo "$(date -Is) $SLURM_JOB_NAME $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
    "$@" &
    step=$!
    while true; do
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break # else a signal interrupted the wait
    done
    if [[ $told == USR1 && $code != 0 ]]; then
        echo "$(date -Is) told to stop before the time limit; requeueing"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
    fi
    echo "$(date -Is) exit code $code"
    exit "$code"
}
