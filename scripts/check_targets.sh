#!/usr/bin/env bash
# Checks the whole program for other systems, without linking it: Windows, and macOS on both of its processors.
#
#     scripts/check_targets.sh                    # all three; says SKIPPED where tools are missing
#     scripts/check_targets.sh --install TARGET … # first unpacks Debian's compiler into target/, where this is Debian
#
# What this finds is Rust that does not compile. C code of libraries is not compiled for macOS: without Apple's headers it could not be.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/targets.sh

if [ "${1:-}" = --install ]; then
    shift
    unpack_debian_rust >&2 || true
fi
[ $# -gt 0 ] || set -- x86_64-pc-windows-gnu aarch64-apple-darwin x86_64-apple-darwin

# A C compiler that makes empty objects, for build scripts that want one although nothing is linked.
stub=$PWD/target/no-cc
mkdir -p target
cat > "$stub" <<'EOF'
#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
    -E) exec cc "$@" ;;
    # A question that only Microsoft's compiler answers.
    '-?') exit 1 ;;
    -o) out=$2 ;;
    esac
    shift
done
[ -z "$out" ] || echo | cc -x c -c -o "$out" -
EOF
chmod +x "$stub"

status=0
for target in "$@"; do
    if ! (
        use_target "$target" || { printf '\n*** SKIPPED: %s was not checked: %s ***\n\n' "$target" "$missing"; exit 0; }
        case $target in *-apple-*)
            export "CC_$(lower "$target")=$stub" "AR_$(lower "$target")=ar"
        esac
        printf '*** %s ***\n' "$target"
        cargo check --locked --package st-tool "${cargo_flags[@]}" --target-dir target/cross
    ); then status=1; fi
done
exit $status
