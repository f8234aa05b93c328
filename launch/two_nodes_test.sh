#!/usr/bin/env bash
# Two machines inside this one: network namespaces, each with its own address and host name, joined by one wire.

usage() {
    cat <<END
Trains on two machines that are made inside this one, and compares every loss with two processes on one machine.

  bash launch/two_nodes_test.sh                 FSDP by torchrun, ZeRO 3 by DeepSpeed without ssh: about a minute
  bash launch/two_nodes_test.sh --all           both backends by both launchers
  bash launch/two_nodes_test.sh --cut           instead: the wire is cut in mid-training; both machines have to end

  --demo DIR            a demo made before (bash launch/train.sh makes output/demo) in place of a new one
  --out DIR             an empty or new folder that keeps logs and metrics

Linux; root, or a user who may make namespaces. However it ends, it leaves no process and no network behind.
Exit code: 0 equal, 1 different or failed, 77 this machine does not allow it, and the message says why.
END
}

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(dirname "$HERE")
PATH=$PATH:/usr/sbin:/sbin
STEPS=4
TIMEOUT_S=15

skip() { echo "skipped: $1" >&2; exit 77; }
fail() { echo "error: $1" >&2; exit 1; }

# Outside: makes the namespaces, whose first process is this script again. When that one ends, or this one is
# killed, even by kill -9, the kernel ends every process in them, and with the last one the network goes.
outside() {
    local own=(--net --uts --mount --pid --fork --kill-child --mount-proc) tool why inside
    [[ $(uname -s) == Linux ]] || skip "network namespaces need Linux"
    for tool in unshare nsenter setpriv ip; do
        command -v "$tool" >/dev/null || skip "$tool is not installed (Debian, Ubuntu: util-linux, iproute2)"
    done
    (( EUID == 0 )) || own=(--user --map-root-user "${own[@]}")
    why=$(unshare "${own[@]}" true 2>&1) || skip "namespaces are not allowed here: $why"
    . "$HERE/setup_env.sh"
    setup_env run  # while there is a network
    export HIGGS_ENGINE_PYTHON=$PYTHON WORK
    if [[ -n ${OUT:-} ]]; then
        mkdir -p "$OUT"
        WORK=$(cd "$OUT" && pwd)
        [[ -z $(ls -A "$WORK") ]] || fail "$OUT is not empty → another folder"
    else
        WORK=$(mktemp -d "${TMPDIR:-/tmp}/two-nodes-XXXXXX")
    fi
    trap 'kill -KILL "${inside:-}" 2>/dev/null || true; [[ -n ${OUT:-} ]] || rm -rf "$WORK"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    setpriv --pdeathsig KILL unshare "${own[@]}" bash "$HERE/two_nodes_test.sh" inside &
    inside=$!
    wait "$inside"
}

make_nodes() {
    hostname node-a
    printf '127.0.0.1 localhost\n10.0.0.1 node-a\n10.0.0.2 node-b\n' >"$WORK/hosts"
    mount --bind "$WORK/hosts" /etc/hosts
    unshare --net --uts sh -c 'hostname node-b; exec sleep infinity' &
    NODE_B=$!
    until [[ $(on b hostname 2>/dev/null) == node-b ]]; do sleep 0.05; done
    ip link add wire type veth peer name wire netns "$NODE_B" 2>"$WORK/why" ||
        skip "no pair of virtual network devices: $(cat "$WORK/why")"
    ip link set lo up && ip address add 10.0.0.1/24 dev wire && ip link set wire up
    on b sh -c 'ip link set lo up && ip address add 10.0.0.2/24 dev wire && ip link set wire up'
}

# on a|b COMMAND...: on that machine
on() {
    local node=$1
    shift
    if [[ $node == a ]]; then "$@"; else nsenter --target "$NODE_B" --net --uts -- "$@"; fi
}

wire_bytes() { awk '$1 == "wire:" { print $2 + $10 }' /proc/net/dev; }

# A small run that logs every step; more settings follow.
settings() {
    local backend=$1 out=$2
    shift 2
    ARGUMENTS=(--model_path "$DEMO/model" --audio_tokenizer_path "$DEMO/audio_tokenizer"
        --train_data_file "$DATA" --codes_cache_dir "$WORK/codes" --output_dir "$out"
        --backend "${backend/zero3/deepspeed}" --max_tokens_per_micro_batch 1024 --micro_batches_per_step 4
        --drop_long_samples --learning_rate 3e-3 --warmup_steps 0 --max_steps "$STEPS" --logging_steps 1
        --dataloader_num_workers 0 --gradient_checkpointing none "$@")
    [[ $backend == fsdp ]] || ARGUMENTS+=(--ds_config zero3)
}

one_node() {
    LAUNCHER=torchrun NPROC=2 timeout 300 bash "$HERE/train.sh" "${ARGUMENTS[@]}" >"$1.log" 2>&1 </dev/null
}

# start NODE LAUNCHER LOG: one process of a run on two nodes, behind this script's back
start() {
    local node=$1 launcher=$2 log=$3 rank=0 variables
    [[ $node == a ]] || rank=1
    variables=(LAUNCHER="$launcher" NODE_RANK="$rank" MASTER_ADDR=node-a)
    if [[ $launcher == deepspeed ]]; then
        variables+=(HOSTFILE="$WORK/hostfile")
    else
        variables+=(NNODES=2 NPROC=1)
    fi
    on "$node" env "${variables[@]}" timeout -k 10 300 bash "$HERE/train.sh" "${ARGUMENTS[@]}" \
        >"$log" 2>&1 </dev/null &
}

# two_nodes LAUNCHER OUT: both nodes to their ends; their exit codes are left in CODE_A and CODE_B
two_nodes() {
    local a b
    start a "$1" "$2.node-a.log"
    a=$!
    start b "$1" "$2.node-b.log"
    b=$!
    CODE_A=0 CODE_B=0
    wait "$a" || CODE_A=$?
    wait "$b" || CODE_B=$?
}

show_end() {
    local log
    for log in "$@"; do
        echo "--- the end of $(basename "$log")" >&2
        tail -n 40 "$log" >&2
    done
}

# The first and the last loss, or where two runs differ first.
compare() {
    "$PYTHON" - "$1/metrics.jsonl" "$2/metrics.jsonl" "$STEPS" <<"END"
import json
import sys

COMPARED = ("loss", "text_loss", "audio_loss", "codebook_losses", "grad_norm", "learning_rate", "tokens_seen")
one, two = ([json.loads(line) for line in open(path)] for path in sys.argv[1:3])
if [line["step"] for line in two] != list(range(1, int(sys.argv[3]) + 1)):
    sys.exit(f"steps logged: {[line['step'] for line in two]}")
for mine, other in zip(one, two, strict=True):
    for name in COMPARED:
        if mine[name] != other[name]:
            sys.exit(f"step {mine['step']}, {name}: {mine[name]} on one node, {other[name]} on two")
print(f"{two[0]['loss']:.6f} {two[-1]['loss']:.6f}")
END
}

compare_with_one_node() {
    local backend launcher out one bytes ends failed=0
    printf '%-6s %-20s %12s %12s %10s  %s\n' backend launcher "first loss" "last loss" "MB on wire" "two nodes and one"
    for backend in fsdp zero3; do
        one=$WORK/$backend-one-node
        settings "$backend" "$one"
        one_node "$one" || { show_end "$one.log"; fail "training on one node failed"; }
        [[ -d $DATA && $DATA != *.json ]] || DATA=$one/data/train-0  # prepared once
        for launcher in torchrun deepspeed; do
            [[ -n ${ALL:-} || $backend-$launcher == fsdp-torchrun || $backend-$launcher == zero3-deepspeed ]] || continue
            out=$WORK/$backend-$launcher
            settings "$backend" "$out"
            bytes=$(wire_bytes)
            two_nodes "$launcher" "$out"
            bytes=$(( ($(wire_bytes) - bytes) / 1000000 ))
            if (( CODE_A || CODE_B )); then
                show_end "$out".node-?.log
                ends="exit codes $CODE_A and $CODE_B" said="- -" failed=1
            elif said=$(compare "$one" "$out" 2>&1); then
                ends="equal in every digit"
            else
                ends=$said said="- -" failed=1
            fi
            # Less than that, and it was not this wire by which gradients went.
            (( bytes > 20 )) || { ends+=", but nothing went over the wire"; failed=1; }
            printf '%-6s %-20s %12s %12s %10s  %s\n' "$backend" \
                "${launcher/deepspeed/deepspeed --no_ssh}" $said "$bytes" "$ends"
        done
    done
    return "$failed"
}

# The wire is cut after the first checkpoint. What happens then is the engine's affair; here it only has to end.
cut_the_wire() {
    local out=$WORK/cut a b began node log code failed=0
    STEPS=1000
    settings fsdp "$out" --save_steps 2 --save_total_limit 2 --timeout_s "$TIMEOUT_S"
    start a torchrun "$out.node-a.log"
    a=$!
    start b torchrun "$out.node-b.log"
    b=$!
    until [[ -d $out/checkpoint-2 ]]; do
        kill -0 "$a" 2>/dev/null || { show_end "$out".node-?.log; fail "it ended before the wire was cut"; }
        sleep 0.2
    done
    ip link set wire down
    began=$SECONDS
    for node in a b; do
        code=0 log=$out.node-$node.log
        wait "${!node}" || code=$?
        echo "node-$node ended $(( SECONDS - began )) s after the wire was cut, with exit code $code"
        # 124 and 137 are those of timeout, which had to end it
        (( code && code != 124 && code != 137 )) || { failed=1; show_end "$log"; }
        sed -n "s/^the run hangs: /    &/p" "$log"
    done
    (( SECONDS - began < TIMEOUT_S + 60 )) || { echo "that is more than timeout_s, $TIMEOUT_S s, and 60"; failed=1; }
    return "$failed"
}

inside() {
    . "$HERE/setup_env.sh"
    setup_env run
    export PYTHONPATH=$TOP DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    [[ -n ${OUT:-} ]] || mount -t tmpfs tmpfs "$WORK"  # gone with the namespace
    make_nodes
    printf 'node-a slots=1\nnode-b slots=1\n' >"$WORK/hostfile"
    if [[ -z ${DEMO:-} ]]; then
        DEMO=$WORK/demo
        "$PYTHON" -c "import sys; from engine.data.demo import make_demo; make_demo(sys.argv[1])" "$DEMO" \
            >"$WORK/demo.log" 2>&1 || { show_end "$WORK/demo.log"; fail "the demo could not be made"; }
    fi
    DATA=$DEMO/data/demo.json
    if [[ -n ${CUT:-} ]]; then cut_the_wire; else compare_with_one_node; fi
}

if [[ ${1:-} == inside ]]; then
    inside
    exit
fi
while (( $# )); do
    case $1 in
        -h | --help) usage; exit ;;
        --all) export ALL=1 ;;
        --cut) export CUT=1 ;;
        --demo | --out)
            [[ -n ${2:-} ]] || fail "$1 needs a folder"
            if [[ $1 == --out ]]; then export OUT=$2; else DEMO=$(cd "$2" && pwd) && export DEMO; fi
            shift ;;
        *) fail "$1 is unknown → bash launch/two_nodes_test.sh --help" ;;
    esac
    shift
done
outside
