#!/usr/bin/env bash
# Runs the program within limits as containers have them: a share of the processors, little memory, nothing to write to, no /proc.
#
#     scripts/test_container.sh [BINARY]      # target/release/st-tool; says SKIPPED where it may not make groups and mounts
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$(realpath "${1:-target/release/st-tool}")
model=$(realpath models/tiny/tiny-q4_0.gguf)
skip() { printf '\n*** SKIPPED: no container was tried: %s ***\n\n' "$1"; exit 0; }
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || skip "only root can make control groups"

# Version 2, or version 1, of which each controller has folders of its own.
top=/sys/fs/cgroup name=st-tool-test-$$
if [ -f $top/cgroup.controllers ]; then
    groups=($top/$name) quota_file=cpu.max quota="100000 100000" limit_file=memory.max
    echo '+cpu +memory' > $top/cgroup.subtree_control 2>/dev/null || skip "the groups are somebody else's"
else
    groups=($top/cpu/$name $top/memory/$name) quota_file=cpu.cfs_quota_us quota=100000 limit_file=memory.limit_in_bytes
fi
end() { for group in "${groups[@]}"; do rmdir "$group" 2>/dev/null || true; done; }
trap end EXIT
mkdir "${groups[@]}" 2>/dev/null || skip "the groups cannot be made"
cpu=${groups[0]} memory=${groups[-1]}
# One processor, and 512 MiB.
echo "$quota" > "$cpu/$quota_file" && echo 536870912 > "$memory/$limit_file" || skip "the groups take no limits"
inside() {
    (
        for group in "${groups[@]}"; do echo $BASHPID > "$group/cgroup.procs"; done
        exec "$@"
    )
}

threads() { sed -n 's/.*"threads": *\([0-9]*\).*/\1/p'; }
bench=("$binary" bench "$model" -p 0 -n 4 -r 1 -o json -q)
printf 'compute threads: %s outside, %s within one processor\n' "$("${bench[@]}" | threads)" "$(inside "${bench[@]}" | threads)"
[ "$(inside "${bench[@]}" | threads)" = 1 ] || fail "the processors' limit was not seen"

run=("$binary" run "$model" -p "Tell me a story." --temp 0 -n 30 -q --ctx 512)
whole=$("${run[@]}")
[ "$(inside "${run[@]}" --memory 200MiB)" = "$whole" ] || fail "within the limit it says something else"
if said=$(inside "${run[@]}" --memory 1GiB 2>&1); then fail "a budget beyond the limit was taken"; fi
printf '%s\n' "$said"
case $said in *"this container may use"*"hint: --memory 512MiB"*) ;; *) fail "that is not why, or there is no hint" ;; esac

bare() { unshare --mount -- sh -c 'mount -o remount,ro,bind / && umount -l /proc && exec "$@"' sh "$@"; }
bare true 2>/dev/null || skip "mounts cannot be made; the limits were tried"
[ "$(bare "${run[@]}")" = "$whole" ] || fail "on a read-only root without /proc it says something else"
[ "$(bare "${run[@]}" --memory 200MiB)" = "$whole" ] || fail "there it says something else in a budget"
printf '*** limits are kept, and a read-only root without /proc is enough ***\n'
