# Sourced by launch/train.sh and tests/run.sh: `setup_env run` or `setup_env dev` leaves the interpreter in
# $PYTHON and its folder first on PATH.
#
#   HIGGS_ENGINE_PYTHON=/path/to/python   use this interpreter (of a conda, a container) and install nothing
#   HIGGS_ENGINE_TORCH=cpu|cuda           torch's build; default: cuda where nvidia-smi lists a GPU
#   TORCH_CPU_INDEX=URL                   where the CPU build comes from, unless pip already finds one
#
# Otherwise .venv at the top of the repository is made once and brought up to date when setup.py has changed.

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

die() { echo "error: $1" >&2; exit 2; }  # engine/exit_codes.py: MISTAKE

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

setup_env() {
    local extras=$1 top venv ready want
    top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [[ -n ${HIGGS_ENGINE_PYTHON:-} ]]; then
        PYTHON=$(command -v "$HIGGS_ENGINE_PYTHON") ||
            die "HIGGS_ENGINE_PYTHON=$HIGGS_ENGINE_PYTHON is no program"
        PATH=$(dirname "$PYTHON"):$PATH
        return
    fi
    venv=$top/.venv
    PYTHON=$venv/bin/python
    ready=$venv/.ready-$extras
    want="$top $(cksum <"$top/setup.py")"
    if ! is_ready; then
        mkdir -p "$venv"
        exec 9>"$venv/.lock"
        base_python
        # The lock belongs to our descriptor, so it outlives this python and ends with us, however we end.
        "$BASE_PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
        is_ready || install_env
        exec 9>&-
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}

# The marker holds what was installed and which build of torch. A machine without a GPU runs the CUDA build
# too, so a .venv shared by login and compute nodes is rebuilt at most once.
is_ready() {
    local made build
    [[ -x $PYTHON && -f $ready ]] || return 1
    { read -r made && read -r build; } <"$ready" || return 1
    [[ $made == "$want" ]] || return 1
    [[ $build == "${HIGGS_ENGINE_TORCH:-$build}" ]] || return 1
    [[ $build == cuda || -n ${HIGGS_ENGINE_TORCH:-} ]] || ! has_gpu
}

base_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if BASE_PYTHON=$(command -v "$name") &&
            "$BASE_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$BASE_PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
                die "$BASE_PYTHON lacks the venv module (Debian, Ubuntu: apt install python3-venv)"
            return
        fi
    done
    command -v python3 >/dev/null || die "python3 is not on PATH; install Python 3.10 or newer"
    die "$(python3 --version) is too old; Python 3.10 or newer is needed, as python3 or python3.x on PATH"
}

say() { echo "setup: $1" >&2; }

# Logs its command's output; of a failure the end is shown.
logged() {
    local what=$1
    shift
    if ! "$@" >>"$log" 2>&1 9>&-; then
        tail -n 15 "$log" >&2
        die "$what failed (all of it: $log). Mend the cause, often the network or a full disk,
       and run the same command again; or set HIGGS_ENGINE_PYTHON to a python that has what setup.py lists."
    fi
}

requirement() { sed -n "s/^ *\"\($1[<>=][^\"]*\)\".*/\1/p" "$top/setup.py"; }

install_env() {
    local log=$venv/install.log build=${HIGGS_ENGINE_TORCH:-} torch found target=$top index=()
    SECONDS=0
    : >"$log"
    rm -f "$venv"/.ready-*
    if [[ -z $build ]]; then
        if has_gpu; then build=cuda; else build=cpu; fi
    fi

    say "making $venv with $("$BASE_PYTHON" --version)"
    rm -f "$venv"/bin/python*  # venv would keep a link whose target is gone
    logged "Making the environment" "$BASE_PYTHON" -m venv "$venv"

    torch=$(requirement torch)
    if [[ $build == cpu && $(uname -s) == Linux ]]; then
        # PyTorch's own index beside pip's: of two equal versions pip takes the one marked +cpu.
        found=$("$PYTHON" -m pip install --dry-run --no-deps --ignore-installed "$torch" 2>>"$log" || true)
        [[ $found == *+cpu* ]] || index=(--extra-index-url "$TORCH_CPU_INDEX")
    fi
    # To pip it is as good as the CUDA build.
    if [[ $build == cuda && $("$PYTHON" -m pip show torch 2>/dev/null) == *+cpu* ]]; then
        logged "Removing the CPU build of torch" "$PYTHON" -m pip uninstall --yes torch
    fi
    say "installing torch, $build build"
    logged "Installing torch" "$PYTHON" -m pip install ${index[@]+"${index[@]}"} \
        "$torch" "$(requirement torchaudio)"

    [[ $extras == run ]] || target+="[$extras]"
    say "installing the engine and what it needs"
    # DeepSpeed compiles an operator when it is first used, not all of them now.
    logged "Installing the engine" env DS_BUILD_OPS="${DS_BUILD_OPS:-0}" "$PYTHON" -m pip install -e "$target"

    # Last, and by a rename, so that an install that was killed is never taken for a whole one.
    printf '%s\n%s\n' "$want" "$build" >"$venv/.tmp"
    [[ $extras == run ]] || cp "$venv/.tmp" "$venv/.ready-run"
    mv "$venv/.tmp" "$ready"
    say "ready after $SECONDS s"
}
