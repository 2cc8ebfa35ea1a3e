#!/usr/bin/env bash
# Counts the instructions that one generated token takes on emulated processors, x86 and AArch64: an emulator cannot time, but it can count.
#
#     scripts/count_instructions.sh [ST_TOOL] [AARCH64_ST_TOOL] [MODEL.gguf …]
#
# ST_TOOL is target/release/st-tool, AARCH64_ST_TOOL a static binary, by default that of `scripts/package.sh aarch64-linux`; without models the
# bundled one is counted. The figure is the difference between an answer of 48 tokens and one of 16, by 32: one thread, greedy, no drafts. It needs a
# C compiler and qemu's user emulation, linked dynamically (`qemu-user`), as the static one takes no plugins. The emulator has no AVX-512.
set -euo pipefail
cd "$(dirname "$0")/.."
x86=${1:-target/release/st-tool}
arm=${2:-target/cross/aarch64-unknown-linux-musl/release/st-tool}
models=("${@:3}")
[ ${#models[@]} -gt 0 ] || models=(models/tiny/tiny-q4_0.gguf)
skip() { printf '\n*** SKIPPED: no instructions were counted: %s ***\n\n' "$1"; exit 0; }
for qemu in qemu-x86_64 qemu-aarch64; do command -v $qemu >/dev/null || skip "$qemu is missing"; done
[ -x "$arm" ] || skip "$arm is not there"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -O2 -shared -fPIC -o "$work/count.so" scripts/count_instructions.c

count() { # N COMMAND …
    local n=$1
    shift
    COUNT=$work/n "$@" --temp 0 -n "$n" -q --threads 1 --draft off -p "Tell me a story about a brave fox named Lily." > "$work/said-$n" 2> "$work/err" || { cat "$work/err" >&2; exit 1; }
    cat "$work/n"
}

printf '%-24s %-34s %14s\n' model processor "per token"
for model in "${models[@]}"; do
    for cpu in x86_64:max x86_64:Nehalem aarch64:cortex-a72 aarch64:cortex-a76 aarch64:max; do
        binary=$x86
        [ "${cpu%%:*}" = x86_64 ] || binary=$arm
        run=("qemu-${cpu%%:*}" -cpu "${cpu##*:}" -plugin "$work/count.so" "$binary")
        isa=$("${run[@]}" --version 2>/dev/null | sed -n 's/^used here: //p')
        few=$(count 16 "${run[@]}" run "$model")
        many=$(count 48 "${run[@]}" run "$model")
        [ "$(wc -c < "$work/said-48")" -gt "$(wc -c < "$work/said-16")" ] || { printf 'error: the answer ends too early\n' >&2; exit 1; }
        printf '%-24s %-34s %14s\n' "$(basename "$model")" "${cpu##*:} ($isa)" $(((many - few) / 32))
    done
done
