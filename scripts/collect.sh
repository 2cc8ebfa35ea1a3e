#!/usr/bin/env bash
# Puts the packages of all targets into one folder, with one list of checksums, which it checks, and this version's part of the changelog.
#
#     scripts/collect.sh PARTS DIST      # PARTS/*/ are the folders that scripts/package.sh filled on each machine
set -euo pipefail
parts=$(cd "${1:?the parts}" && pwd)
mkdir -p "${2:?the folder for all}"
dist=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
find "$parts" -type f ! -name SHA256SUMS -exec cp {} "$dist" \;
find "$parts" -type f -name SHA256SUMS -exec cat {} + | LC_ALL=C sort -u -k 2 > "$dist/SHA256SUMS"
(cd "$dist" && sha256sum --check --strict SHA256SUMS)
# The newest section that is not empty: the version's own where there is one.
awk '/^## \[/ { if (body) exit; seen = 1; next } seen && NF { body = 1 } body' CHANGELOG.md > "$dist/NOTES.md"
