#!/usr/bin/env bash
# Makes the environment if need be, then lints and tests: bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh
setup_env dev

# Ranks share the cores, and no test downloads.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
has_gpu || export DS_ACCELERATOR=cpu

"$PYTHON" -m ruff check engine tests benchmarks setup.py  # not what a user trains beside it
everything=tests
for word in "$@"; do
    [[ -e "${word%%::*}" ]] && everything=
done
# two tests at a time; those of a file stay together, for they share what it has set up; order: tests/conftest.py
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $everything "$@"
