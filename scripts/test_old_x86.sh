#!/usr/bin/env bash
# Runs the program on emulated x86 processors of several ages: each chooses the instruction sets that it has, and the logits are the same bits.
#
#     scripts/test_old_x86.sh [BINARY]      # target/release/st-tool; says SKIPPED without qemu-x86_64
#
# The emulator has no AVX-VNNI and no AVX-512. `run --isa` forces those that this machine has, and the tests compare them.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-target/release/st-tool}
qemu=$(command -v qemu-x86_64-static || command -v qemu-x86_64 || true)
[ -n "$qemu" ] || { printf '\n*** SKIPPED: no old x86 was tried: qemu-x86_64 is missing ***\n\n'; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ids=1,5,300,77,12,2000,9,41,7,1000

"$binary" logits models/tiny/tiny-q4_0.gguf --token-ids $ids -q -o "$work/here.safetensors"
# SSE4.2, AVX, no AVX with newer instructions, AVX2 and FMA, AVX2 without FMA, AVX2 with all that the emulator has.
for cpu in Nehalem:scalar SandyBridge:scalar Denverton:scalar Haswell:avx2 Haswell,-fma:scalar max:avx2; do
    model=${cpu%:*} expected=${cpu##*:}
    used=$("$qemu" -cpu "$model" "$binary" --version 2>/dev/null | sed -n 's/^used here: //p')
    "$qemu" -cpu "$model" "$binary" logits models/tiny/tiny-q4_0.gguf --token-ids $ids -q -o "$work/$model.safetensors" 2>/dev/null
    cmp "$work/here.safetensors" "$work/$model.safetensors"
    printf '%-14s %-7s the same bits\n' "$model" "$used"
    [ "$used" = "$expected" ] || { printf 'error: %s was expected\n' "$expected" >&2; exit 1; }
done
