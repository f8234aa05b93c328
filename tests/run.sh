#!/usr/bin/env bash
# Makes the environment if need be, then lints and tests: bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh

# The report is tried in a browser; where there is none and none can be installed, that test skips itself.
install_browser() {
    command -v chromium chromium-browser google-chrome > /dev/null && return
    [[ $(id -u) == 0 ]] && command -v apt-get > /dev/null || return 0
    echo "setup: installing chromium, to look at the report"
    { apt-get update && apt-get install -y --no-install-recommends chromium; } > /dev/null 2>&1 ||
        echo "setup: chromium could not be installed"
}
install_browser &
setup_env dev
wait

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
