#!/usr/bin/env bash
# Builds the image of packaging/Containerfile from a Linux archive, and tries it: no network, nothing writable, 512 MiB, and a budget that is more.
#
#     scripts/image.sh ARCHIVE.tar.gz TAG
set -euo pipefail
cd "$(dirname "$0")/.."
archive=${1:?an archive of scripts/package.sh} tag=${2:?a name for the image}
engine=$(command -v podman || command -v docker || true)
[ -n "$engine" ] || { printf '\n*** SKIPPED: there is neither podman nor docker ***\n\n'; exit 0; }
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
tar -xzf "$archive" -C "$context" --strip-components=1
"$engine" build -f packaging/Containerfile -t "$tag" "$context"
inside=("$engine" run --rm --network none --read-only --memory 512m)
"${inside[@]}" "$tag" run -p "Tell me a story." -n 20 --quiet
"${inside[@]}" "$tag" run -p "Tell me a story." -n 20 --quiet --memory 256MiB --ctx 512
if "${inside[@]}" "$tag" run -p "Tell me a story." -n 20 --quiet --memory 1GiB; then
    printf 'error: a budget beyond the container was taken\n' >&2
    exit 1
fi
