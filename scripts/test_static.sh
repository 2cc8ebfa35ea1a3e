#!/usr/bin/env bash
# Runs a static binary in a root folder that holds nothing but it and a model: no libraries, no /proc, no /sys, no /tmp, no certificates.
#
#     scripts/test_static.sh BINARY [MODEL.gguf] [EMULATOR]
#
# It needs the right to change the root (it is SKIPPED without), and for another processor's binary a static emulator such as qemu-aarch64-static.
# What has to work: the README's first command, a run streamed from the disk in a budget, and a server that answers one request.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:?the binary}
model=${2:-models/tiny/tiny-q4_0.gguf}
emulator=${3:-}

[ "$(id -u)" = 0 ] || { printf '\n*** SKIPPED: only root can run a program in another root ***\n\n'; exit 0; }
root=$(mktemp -d)
server=
end() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$root"; }
trap end EXIT
install -m 755 "$binary" "$root/st-tool"
install -m 644 "$model" "$root/model.gguf"
enter=(chroot "$root")
if [ -n "$emulator" ]; then
    install -m 755 "$(command -v "$emulator")" "$root/emulator"
    enter+=(/emulator)
fi
enter+=(/st-tool)
export ST_TOOL_API_KEY=

printf '*** %s: %s bytes; in its root: %s ***\n' "$binary" "$(stat -c %s "$binary")" "$(ls "$root" | tr '\n' ' ')"
"${enter[@]}" --version
# What one start takes: the median of nine.
for _ in 1 2 3 4 5 6 7 8 9; do
    begin=$(date +%s%N)
    "${enter[@]}" -V >/dev/null
    printf '%s\n' $((($(date +%s%N) - begin) / 1000))
done | sort -n | sed -n '5s/$/ µs from start to end of -V (median of 9)/p'

story() { "${enter[@]}" run "$@" --temp 0 -n 60 --quiet -p "Tell me a story about a brave fox named Lily."; }
"${enter[@]}" run -p "Tell me a story about a brave fox named Lily." -n 40
whole=$(story /model.gguf)
streamed=$(story /model.gguf --memory 128MiB --ctx 512 --io buffered)
[ -n "$whole" ] && [ "$whole" = "$streamed" ] || { printf 'error: streamed from the disk it says something else:\n%s\n%s\n' "$whole" "$streamed" >&2; exit 1; }
printf 'in memory and streamed: the same %s bytes\n' "${#whole}"

"${enter[@]}" serve /model.gguf --port 0 --ctx 512 --memory 192MiB > "$root/address" 2> "$root/log" &
server=$!
# On stdout the address stands when the model is there.
for _ in $(seq 600); do
    address=$(grep -o 'http://127[0-9.]*:[0-9]*' "$root/address" || true)
    [ -n "$address" ] && break
    kill -0 "$server" || { cat "$root/log" >&2; exit 1; }
    sleep 0.1
done
answer=$(curl -sS "$address/v1/completions" -H 'Content-Type: application/json' -d '{"model": "model", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}')
printf '%s\n' "$answer"
case $answer in *'"text":'*) ;; *) printf 'error: the server did not answer\n' >&2; exit 1 ;; esac
kill -TERM "$server"
wait "$server" || true
server=
printf '*** all three work ***\n'
