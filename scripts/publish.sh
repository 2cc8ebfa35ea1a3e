#!/usr/bin/env bash
# Publishes the crates that `cargo install st-tool` needs, each after those that it needs.
#
#     scripts/publish.sh --dry-run      # packs each, and builds it from what was packed; with --no-verify behind it, builds nothing
#     scripts/publish.sh --list         # what each would contain; needs no network
#     scripts/publish.sh                # publishes; needs `cargo login`
set -euo pipefail
cd "$(dirname "$0")/.."
crates=(st-format st-sys st-gguf st-kernels st-experts st-model st-grammar st-server st-convert st-hub st-tool)
packages=()
for crate in "${crates[@]}"; do packages+=(--package "$crate"); done
case ${1:-} in
--dry-run) cargo publish "$@" --locked "${packages[@]}" ;;
--list)
    for crate in "${crates[@]}"; do
        printf '*** %s ***\n' "$crate"
        cargo package --list --locked --package "$crate"
    done
    ;;
*) cargo publish --locked "${packages[@]}" ;;
esac
