# Sourced by the batch scripts: environment, and running a step so that a warned job is requeued and goes on where it stopped.
set -uo pipefail

# The repository; the job itself works where it was submitted, so that relative paths mean what they meant there.
ROOT=$PWD
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

# Secrets (HF_TOKEN, WANDB_API_KEY) come from the environment or from .env, never from options: those are visible to everybody in squeue.
for file in "$ROOT/.env" .env; do
    if [[ -f $file ]]; then set -a; source "$file"; set +a; fi
done

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python; fi
fi
export PYTHON

# Where a site or --export=NONE keeps the submitting shell's variables out of the job, srun would keep the job's own out of its steps: .env's too.
export SLURM_EXPORT_ENV=ALL

# Rows and micro-batches of many lengths: without this the CUDA allocator keeps blocks that fit none of the next ones.
if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

# share_node NUMBER: workers or ranks per node, one for each NUMBER of its GPUs, whatever their kind, or REFDPO_RANKS_PER_NODE (for nodes without
# any); and their CPUs.
threads=${OMP_NUM_THREADS:-}
share_node() {
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    if [[ ! $gpus =~ ^[0-9]+$ ]]; then
        echo "Error: SLURM_GPUS_ON_NODE=$gpus: no number; expected how many GPUs of this node are the job's. Export it in .env." >&2
        exit 2
    fi
    ((gpus > 0)) || gpus=$1
    if [[ -z ${REFDPO_RANKS_PER_NODE:-} ]] && ((gpus % $1)); then
        echo "Error: --gpus-per-worker $1: some GPUs would do nothing; expected a divisor of $gpus, the number of GPUs of this node." >&2
        exit 2
    fi
    ranks=${REFDPO_RANKS_PER_NODE:-$((gpus / $1))}
    cpus=$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
    cpus_per_rank=$((cpus / ranks > 0 ? cpus / ranks : 1))
    export OMP_NUM_THREADS=${threads:-$cpus_per_rank}
}
share_node 1

# gpus_per_worker OPTION…: what precompute reads in its options, those of a --config file too; 1 where they are wrong, which it then says itself.
gpus_per_worker() {
    PYTHONPATH=$ROOT "$PYTHON" - "$@" 2>/dev/null <<'END' || echo 1
import sys
import cli
print(cli.main.commands["precompute"].make_context("precompute", sys.argv[1:]).params["gpus_per_worker"])
END
}

# sbatch_options: what this job was submitted with, for the command that is printed to be typed again.
sbatch_options() {
    local name value
    for name in partition=JOB_PARTITION account=JOB_ACCOUNT qos=JOB_QOS nodes=JOB_NUM_NODES ntasks-per-node=NTASKS_PER_NODE \
        cpus-per-task=CPUS_PER_TASK gpus-per-node=GPUS_PER_NODE mem=MEM_PER_NODE; do
        value=SLURM_${name#*=}
        value=${!value:-}
        [[ -z $value || $value == "(null)" ]] || printf '%s ' "--${name%%=*}=$value"
    done
    if [[ -n ${SLURM_ARRAY_TASK_MIN:-} ]]; then
        printf '%s ' "--array=$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX:${SLURM_ARRAY_TASK_STEP:-1}"
    fi
    value=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l 2>/dev/null | head -n 1) && [[ -n $value ]] && printf '%s ' "--time=$value"
    [[ $ROOT == "$PWD" ]] || printf '%s ' "--chdir=${ROOT@Q}"
}

# typed_again SCRIPT OPTION…: tell the processes of this job what to print as the command to type again. `cli.py submit` has told already.
typed_again() {
    local script=$1
    shift
    [[ $ROOT == "$PWD" ]] || script=$ROOT/$script
    export REFDPO_COMMAND=${REFDPO_COMMAND:-"sbatch $(sbatch_options)${script@Q} ${*@Q}"}
}

# near_gpus DEVICES: whether every rank can be bound to the CPUs beside its GPU. That takes numactl, several NUMA nodes, and that the job may use
# CPUs of each NUMA node that has an NVIDIA GPU. DEVICES is the kernel's folder of PCI devices.
near_gpus() {
    local device node mine found=()
    command -v numactl >/dev/null || return 1
    mine=" $(numactl --show 2>/dev/null | sed -n 's/^nodebind: *//p') "
    for device in "$1"/*; do
        [[ $(cat "$device/vendor" 2>/dev/null) == 0x10de && $(cat "$device/class" 2>/dev/null) == 0x03* ]] || continue
        node=$(cat "$device/numa_node" 2>/dev/null) || return 1
        [[ $mine == *" $node "* ]] || return 1
        [[ " ${found[*]} " == *" $node "* ]] || found+=("$node")
    done
    ((${#found[@]} > 1))
}

# run_step COMMAND…: run it and exit as it does. SIGUSR1, which Slurm sends some time before the limit (--signal), reaches the workers; they put
# their work down and the job is requeued. SIGTERM reaches them too, but whoever sends it decides about requeueing: preemption does, scancel not.
run_step() {
    local step code interrupted told=""
    trap 'told=USR1 interrupted=1; kill -USR1 "$step"' USR1
    trap 'told=TERM interrupted=1; kill -TERM "$step"' TERM
    echo "$(date -Is) $SLURM_JOB_NAME $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)):$(printf ' %q' "$@")"
    "$@" &
    step=$!
    while true; do
        interrupted=""
        wait "$step"
        code=$?
        [[ -n $interrupted ]] || break # by a signal: the step is at work still, or has ended, and Bash remembers how
    done
    # "I can go on", which workers say themselves; torchrun ends with 1 whatever its ranks said.
    if [[ -n $told && $code == 1 && "$*" == *torch.distributed.run* ]]; then code=75; fi
    if [[ $told == USR1 && $code != 0 ]]; then
        echo "$(date -Is) told to stop before the time limit; requeueing"
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
    fi
    echo "$(date -Is) exit code $code"
    exit "$code"
}
