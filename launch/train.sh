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

With `prepare` as the first word, all of them make a prepared store of the data instead (higgs-engine prepare --help);
with `evaluate`, they measure a model on held-out data (higgs-engine evaluate --help); with `doctor`, they check
machines, network and folders (higgs-engine doctor --help). `--dry_run` shows the settings and
what would run where, and stops.

Several machines without SLURM:

  HOSTFILE=hosts bash launch/train.sh ...       started from the first one; needs ssh to all of them, and pdsh
  HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=first bash launch/train.sh ...       on each, with its own NODE_RANK
  LAUNCHER=torchrun NNODES=2 NODE_RANK=0 MASTER_ADDR=first bash launch/train.sh ...                   likewise
  LAUNCHER=torchrun NNODES=2 RDZV_ENDPOINT=first bash launch/train.sh ...     the same on each: numbered as they come
  LAUNCHER=torchrun NNODES=1:4 RDZV_ENDPOINT=first bash launch/train.sh --resume auto ...      machines come and go

Environment variables:

  NPROC                 processes on this machine (default: its visible GPUs, or 2 without any)
  LAUNCHER              deepspeed (default), torchrun, or none: a single process, which a debugger can hold
  HOSTFILE              machines and their GPUs, as in launch/hostfile.example
  NNODES NODE_RANK MASTER_ADDR MASTER_PORT      where machines meet (port 29500; a single one: any free port)
  RDZV_ENDPOINT RDZV_ID                         likewise, host[:port] for the c10d rendezvous of torchrun
  DS_ACCELERATOR=cpu    trains on the CPU although there are GPUs
  HIGGS_ENGINE_PYTHON HIGGS_ENGINE_TORCH TORCH_CPU_INDEX      the environment; see launch/setup_env.sh

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C go to the ranks, which save and leave with exit code 75; a second SIGTERM or Ctrl-C
ends everything. `--max_restarts N` starts the run again after a failure, from its last checkpoint; `--resume auto` does
that in a later start. Exit codes: 0 done, 1 failed, 2 a mistake to mend, 3 diverged, 4 no progress, 75 stopped by a
signal, 76 max_train_hours are over.
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
[[ ${1:-} != -h && ${1:-} != --help ]] || usage
# engine/launch does the rest: it plans the processes, starts them, tells them of signals, and starts them again.
# Not by -m, which looks for the engine in the working directory first.
exec "$PYTHON" -c "import sys
sys.path[0] = sys.argv.pop(1)
from engine.launch.__main__ import main
sys.exit(main(sys.argv[1:]))" "$TOP" "$SELF" "$@"
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
        sys.stderr.write(
            f"error: {missing.name} is not installed for {sys.executable}.\n"
            "Install the engine there (pip install -e .), or let `bash launch/train.sh` make an environment.\n"
        )
        sys.exit(2)  # engine/exit_codes.py: MISTAKE
    # DeepSpeed says the local rank twice, as an argument and as LOCAL_RANK.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    command = [] if arguments[:1] in (["prepare"], ["evaluate"], ["doctor"]) else ["train"]
    sys.exit(main(command + arguments))
# The end of the Python half
