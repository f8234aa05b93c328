#!/usr/bin/env bash
''':'
# One file in two languages: for Python, which the launchers start on each rank, the bash half is a string;
# for bash, the Python half is a here-document. The bash half has no backslash, nor three quotes in a row.

usage() {
    cat <<"END"
Fine-tunes Higgs Audio v2. All of these train with the same settings:

  bash launch/train.sh                          no arguments: a demo on data that it makes itself
  bash launch/train.sh --config recipe.yaml     every GPU of this machine, or 2 processes on its CPU
  deepspeed launch/train.sh --config ...        in an environment of yours, with the flags of deepspeed
  torchrun --nproc_per_node 8 launch/train.sh --config ...
  srun bash launch/train.sh --config ...        one task per GPU, or one per node; see launch/slurm.sbatch

With `prepare` as the first word, all of them make a prepared store of the data instead (higgs-engine prepare --help).

Several machines without SLURM:

  HOSTFILE=hosts bash launch/train.sh ...       started from the first one; needs ssh to all of them, and pdsh
  HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=first bash launch/train.sh ...       on each, with its own NODE_RANK
  LAUNCHER=torchrun NNODES=2 NODE_RANK=0 MASTER_ADDR=first bash launch/train.sh ...                   likewise

Environment variables:

  NPROC                 processes on this machine (default: its visible GPUs, or 2 without any)
  LAUNCHER              deepspeed (default), torchrun, or none: a single process, which a debugger can hold
  HOSTFILE              machines and their GPUs, as in launch/hostfile.example
  NNODES NODE_RANK MASTER_ADDR MASTER_PORT      where machines meet (port 29500; a single one: any free port)
  DS_ACCELERATOR=cpu    trains on the CPU although there are GPUs
  HIGGS_ENGINE_PYTHON HIGGS_ENGINE_TORCH TORCH_CPU_INDEX      the environment; see launch/setup_env.sh

SIGTERM and Ctrl-C go to the ranks, which leave; a second one stops everything. `--resume auto` goes on from
the last checkpoint.
END
}

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(dirname "$HERE")
SELF=$HERE/train.sh
. "$HERE/setup_env.sh"
setup_env run
export PYTHONPATH=$TOP${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Started once per rank by srun, mpirun or `torchrun --no-python`: a worker. Kubernetes operators set RANK and
# WORLD_SIZE once per machine; LAUNCHER=torchrun tells them apart. A batch script of SLURM is no rank, though
# it has SLURM_PROCID: only the tasks of srun have SLURM_STEP_NUM_TASKS.
TASKS=${SLURM_STEP_NUM_TASKS:-1} NODES=${SLURM_STEP_NUM_NODES:-1}
if [[ -n ${RANK:-} && -n ${WORLD_SIZE:-} && ( -n ${LOCAL_RANK:-} || -z ${LAUNCHER:-} ) ]] ||
    [[ -n ${OMPI_COMM_WORLD_RANK:-} ]] || (( TASKS > NODES )); then
    exec "$PYTHON" -u "$SELF" "$@"
fi
if (( TASKS > 1 )); then  # one task per node, which starts the ranks of its node
    LAUNCHER=${LAUNCHER:-torchrun} NNODES=$NODES NODE_RANK=$SLURM_NODEID
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1 || true)}
    MASTER_PORT=${MASTER_PORT:-$(( 10000 + (SLURM_JOB_ID + SLURM_STEP_ID) % 20000 ))}
    [[ -n $MASTER_ADDR ]] || die "scontrol is not here to name the first node: set MASTER_ADDR"
fi

# torch is asked, for it knows the masks and its build, unless there is no GPU to ask about.
GPUS=0
if [[ ${DS_ACCELERATOR:-} != cpu && -n ${CUDA_VISIBLE_DEVICES-all} ]] && has_gpu; then
    GPUS=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
    (( GPUS )) || die "this machine has GPUs that the torch of $PYTHON cannot use;
       install a build of torch for its driver, or set DS_ACCELERATOR=cpu to train on the CPU"
fi
(( GPUS )) || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

case ${1:-demo} in
    demo) exec "$PYTHON" -m engine demo "${@:2}" ;;
    -h | --help) usage; echo; exec "$PYTHON" -m engine train --help ;;
esac

NPROC=${NPROC:-$(( GPUS ? GPUS : 2 ))}
(( GPUS == 0 || NPROC <= GPUS )) || die "NPROC=$NPROC, but $GPUS GPUs are visible"
CORES=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( CORES > NPROC ? CORES / NPROC : 1 ))}

LAUNCHER=${LAUNCHER:-deepspeed} NNODES=${NNODES:-1}
# DeepSpeed knows GPUs by number alone; torchrun leaves UUIDs, as MIG slices always have, to the ranks.
if [[ $LAUNCHER == deepspeed && ${CUDA_VISIBLE_DEVICES:-0} == *[!0-9,]* ]]; then
    LAUNCHER=torchrun
fi
if [[ -n ${HOSTFILE:-} ]] || (( NNODES > 1 )); then
    MASTER_PORT=${MASTER_PORT:-29500}
fi
[[ -n ${MASTER_PORT:-} ]] ||
    MASTER_PORT=$("$PYTHON" -c "import socket; print(socket.create_server((str(), 0)).getsockname()[1])")

case $LAUNCHER in
    deepspeed)
        (( NNODES == 1 )) || die "LAUNCHER=deepspeed finds the other machines in HOSTFILE, not from NNODES"
        command=("$PYTHON" -m deepspeed.launcher.runner -q --no_local_rank --master_port "$MASTER_PORT")
        if [[ -n ${HOSTFILE:-} ]]; then
            # DeepSpeed would train on this machine alone.
            [[ -f $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE does not exist"
            command+=(--hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
            [[ -z ${NODE_RANK:-} ]] || command+=(--no_ssh --node_rank "$NODE_RANK")
        elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
            # Beside --num_gpus DeepSpeed ignores the mask and takes the first GPUs of the machine.
            IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
            unset CUDA_VISIBLE_DEVICES
            command+=(--include "localhost:$(IFS=,; echo "${visible[*]:0:NPROC}")")
        else
            command+=(--num_gpus "$NPROC")
        fi ;;
    torchrun)
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC"
            --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
            --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT") ;;
    none) exec "$PYTHON" -u "$SELF" "$@" ;;
    *) die "LAUNCHER=$LAUNCHER; it is one of deepspeed, torchrun, none" ;;
esac

# The launcher leads a process group of its own, which job control (-m) gives it.
set -m
"${command[@]}" "$SELF" "$@" </dev/null &
leader=$!
set +m

# A launcher that is told to stop gives its ranks 30 s, too little to save a large model, and the DeepSpeed
# runner dies at once and leaves them behind. So the ranks are told, and the launcher ends when they have.
signal_ranks() {
    "$PYTHON" - "$leader" "$1" <<"END"
import signal, sys
import psutil

def is_rank(process):
    # A rank has RANK, its launcher has not; the data workers that inherit it are their rank's business.
    try:
        return "RANK" in process.environ() and "RANK" not in process.parent().environ()
    except (AttributeError, psutil.Error):  # just ended
        return False

try:
    started = psutil.Process(int(sys.argv[1])).children(recursive=True)
    ranks = [process for process in started if is_rank(process)]
    for rank in ranks:
        rank.send_signal(signal.Signals["SIG" + sys.argv[2]])
except psutil.Error:
    sys.exit(0)
sys.exit(not ranks)
END
}

signalled=0
forward() {
    interrupted=1
    if (( signalled++ )) || ! signal_ranks "$1"; then
        kill -s TERM -- "-$leader" 2>/dev/null || true
    fi
}
for name in TERM INT HUP; do
    trap "forward $name" "$name"
done

# A signal ends wait early, with a code of its own.
code=0 interrupted=1
while (( interrupted )); do
    interrupted=0
    wait "$leader" 2>/dev/null && code=0 || code=$?
done
# Nothing outlives it but what is just ending. If ranks do, their launcher was killed, and the code is a lie.
for (( tenths = 0; tenths < 50; tenths++ )); do
    kill -0 -- "-$leader" 2>/dev/null || exit "$code"
    sleep 0.1
done
kill -s TERM -- "-$leader" 2>/dev/null || true
while kill -0 -- "-$leader" 2>/dev/null; do sleep 0.2; done
exit $(( code ? code : 1 ))
: <<"# The end of the Python half"
'''
import os
import sys

if __name__ == "__main__":  # a process that a rank spawns reads this file again
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from engine.cli import main
    except ModuleNotFoundError as missing:
        sys.exit(
            f"error: {missing.name} is not installed for {sys.executable}.\n"
            "Install the engine there (pip install -e .), or let `bash launch/train.sh` make an environment."
        )
    # DeepSpeed says the local rank twice, as an argument and as LOCAL_RANK.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    command = [] if arguments[:1] == ["prepare"] else ["train"]
    sys.exit(main(command + arguments))
# The end of the Python half
