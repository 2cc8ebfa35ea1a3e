#!/usr/bin/env bash
# Makes receipts on this x86 machine, with its best kernels, two threads and the model in memory, and proves them by other means: with portable
# kernels, one thread and the smallest budget here; and on emulated AArch64 processors without dot products, with them, and with i8mm
# (Neoverse V1, where the emulator has it, and all that it has).
# Three types (Q4_0, Q8_0, and the K-quants of Q4_K_M), each in both layouts.
#
#     scripts/test_receipts_aarch64.sh [ST_TOOL] [AARCH64_ST_TOOL] [SYNTH]
#
# ST_TOOL is target/release/st-tool, SYNTH the `synth` beside it; AARCH64_ST_TOOL a static binary, by default that of
# `scripts/package.sh aarch64-linux`. QEMU names the emulator, by default qemu-aarch64; without it or that binary it says SKIPPED.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$(realpath "${1:-target/release/st-tool}")
other=$(realpath "${2:-target/cross/aarch64-unknown-linux-musl/release/st-tool}")
synth=${3:-${tool%/*}/synth}
qemu=$(command -v ${QEMU:+"$QEMU"} qemu-aarch64-static qemu-aarch64 | head -1 || true)
skip() { printf '\n*** SKIPPED: no receipt was proven on AArch64: %s ***\n\n' "$1"; exit 0; }
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }
[ -n "$qemu" ] || skip "qemu-aarch64 is missing"
[ -x "$other" ] || skip "$other is not there"
# It lists them, and fails.
models=$("$qemu" -cpu help || true)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Both layouts under one name, which a receipt has in it.
mkdir "$work/gguf" "$work/offload"
cp models/tiny/tiny-q4_0.gguf "$work/gguf/Q4_0.gguf"
"$tool" quantize -q models/tiny/checkpoint --q8_0 -o "$work/gguf/Q8_0.gguf"
# Random weights, as no program here makes K-quants of floats.
"$synth" make --format gguf --mix q4_k_m --layers 3 --hidden 256 --heads 4 --kv-heads 2 --head-dim 64 --experts 8 --active 2 --ffn 256 \
    "$work/gguf/Q4_K_M.gguf" > /dev/null 2>&1

# The least memory that a command says it needs, and half a MiB.
least() { # COMMAND …
    local said
    said=$("$@" --memory 1MiB 2>&1 || true)
    said=$(sed -n 's/.*needs at least \([0-9]*\) .*/\1/p' <<< "$said")
    [ -n "$said" ] || fail "no least memory was told by: $*"
    printf '%s' $((said + (3 << 19)))
}

proven=0
same() { # WHAT COMMAND …
    local what=$1 said
    shift
    said=$("$@" 2>&1) || fail "$what: $said"
    case $said in "the same: "*) ;; *) fail "$what: $said" ;; esac
    printf '    %-58s %s\n' "$what" "$said"
    proven=$((proven + 1))
}

"$tool" --version | sed -n 's/^used here/made with/p'
answer() { # LAYOUT TYPE RECEIPT OPTIONS …
    local model=$2.gguf receipt=$3
    cd "$work/$1"
    shift 3
    "$tool" run "$model" -q -p "Tell me a story about a brave fox named Lily." -n 32 --seed 7 --temp 1.1 --receipt "$receipt" "$@" > /dev/null
}
for type in Q4_0 Q8_0 Q4_K_M; do
    receipt=$work/$type.json
    "$tool" layout -q "$work/gguf/$type.gguf" "$work/offload/$type.gguf" --to offload
    (answer gguf $type "$receipt" --threads 2)
    (answer offload $type "$work/packed.json" --isa scalar --threads 1)
    cmp "$work/packed.json" "$receipt" || fail "$type: packed, the receipt is another"
    printf '%s: a receipt of %s bytes; packed, with portable kernels and one thread: the same bytes\n' "$type" "$(stat -c %s "$receipt")"
    for layout in gguf offload; do
        model=$work/$layout/$type.gguf
        here=("$tool" verify -q "$receipt" "$model" --isa scalar --threads 1)
        same "$layout, x86, portable kernels, one thread" "${here[@]}"
        memory=$(least "${here[@]}")
        same "$layout, x86, portable kernels, one thread, $memory bytes" "${here[@]}" --memory "$memory"
        for cpu in cortex-a72 cortex-a76 neoverse-v1 max; do
            grep -qw "$cpu" <<< "$models" || { printf '    SKIPPED: %s, which this emulator lacks\n' "$cpu"; continue; }
            there=("$qemu" -cpu $cpu "$other" verify -q "$receipt" "$model")
            same "$layout, $cpu, two threads" "${there[@]}" --threads 2
        done
        same "$layout, max, portable kernels, one thread" "${there[@]}" --isa scalar --threads 1
        # The emulator's own memory counts as the program's.
        memory=$(least "${there[@]}" --threads 1)
        same "$layout, max, one thread, $memory bytes" "${there[@]}" --threads 1 --memory "$memory"
    done
done
printf '*** %s proofs: the same tokens and logits everywhere ***\n' "$proven"
