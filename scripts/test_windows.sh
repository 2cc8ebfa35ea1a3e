#!/usr/bin/env bash
# Builds the program for Windows and tries it under wine: answers, a streamed run, conversions, the server, names and paths, Ctrl-C as far as wine
# has it. With --tests also the tests of the crates that the system matters to.
#
#     scripts/test_windows.sh [--binary st-tool.exe] [--tests]
#
# It needs mingw-w64, wine, and a standard library for Windows (scripts/targets.sh); it says SKIPPED where they are missing.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/targets.sh

skip() { printf '\n*** SKIPPED: the program was not tried on Windows: %s ***\n\n' "$1"; exit 0; }
fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

binary= tests=
while [ $# -gt 0 ]; do
    case $1 in
    --binary) binary=$2; shift ;;
    --tests) tests=1 ;;
    esac
    shift
done
target=x86_64-pc-windows-gnu
wine=$(PATH=$PATH:/usr/lib/wine command -v wine64 || command -v wine || true)
[ -n "$wine" ] || skip "wine is missing"
export WINEPREFIX=${WINEPREFIX:-$PWD/target/wine} WINEDEBUG=-all
if [ -z "$binary" ] || [ -n "$tests" ]; then use_target "$target" || skip "$missing"; fi
if [ -z "$binary" ]; then
    cargo build --locked --package st-tool "${cargo_flags[@]}" --target-dir target/cross
    binary=target/cross/$target/debug/st-tool.exe
fi
# Wine before version 9 lacks a library of one function, which Rust's standard library asks for random numbers.
lend_random_numbers() {
    [ -f "$1/bcryptprimitives.dll" ] && return
    printf '%s\n' '#include <windows.h>' 'BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);' \
        '__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T len) { return SystemFunction036(data, (ULONG)len); }' > "$1/prng.c"
    x86_64-w64-mingw32-gcc -shared -o "$1/bcryptprimitives.dll" "$1/prng.c" -ladvapi32
}
"$wine" cmd /c ver >/dev/null 2>&1 || true
[ -f "$WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll" ] || lend_random_numbers "$WINEPREFIX/drive_c/windows/system32"

if [ -n "$tests" ]; then
    CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER=$wine cargo test --locked --package st-sys --package st-gguf "${cargo_flags[@]}" --target-dir target/cross
fi

work=$(mktemp -d)
server=
end() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"; }
trap end EXIT
run() { timeout 600 "$wine" "$binary" "$@"; }
text() { tr -d '\r'; }

run --version | text
cp models/tiny/tiny-q4_0.gguf "$work/model.gguf"
win() { printf 'Z:%s' "$(printf '%s' "$1" | tr '/' '\\')"; }
story() { run run "$@" --temp 0 -n 40 --quiet -p "Tell me a story about a brave fox named Lily." | text; }

bundled=$(story tiny)
[ -n "$bundled" ] || fail "no answer"
printf '%s\n' "$bundled"
[ "$(story "$(win "$work/model.gguf")")" = "$bundled" ] || fail "from a file it says something else"
for io in direct buffered; do
    [ "$(story "$(win "$work/model.gguf")" --memory 160MiB --ctx 512 --io $io)" = "$bundled" ] || fail "streamed ($io) it says something else"
done
printf 'in memory, from a file, streamed past the cache and through it: the same\n'

run --quiet quantize 'models\tiny\checkpoint' -o "$(win "$work/made.gguf")" --q4_0
cmp "$work/made.gguf" models/tiny/tiny-q4_0.gguf || fail "the conversion differs from that on Linux"
run --quiet layout "$(win "$work/made.gguf")" "$(win "$work/packed.gguf")" --to offload
[ "$(story "$(win "$work/packed.gguf")" --memory 160MiB --ctx 512)" = "$bundled" ] || fail "packed it says something else"
printf 'converted: the same bytes as on Linux; packed: the same answer\n'

if run quantize 'models\tiny\checkpoint' -o "$(win "$work/made.gguf")" --q4_0 2> "$work/err"; then fail "an output was replaced unasked"; fi
text < "$work/err"
long=$work/$(printf 'a%.0s' $(seq 120))/$(printf 'b%.0s' $(seq 120))/$(printf 'c%.0s' $(seq 60))
mkdir -p "$long"
run --quiet quantize 'models\tiny\checkpoint' -o "$(win "$long/ü 狐狸.gguf")" --q4_0
cmp "$long/ü 狐狸.gguf" models/tiny/tiny-q4_0.gguf || fail "a long path"
printf 'a path of %s characters, not all of them ASCII: written\n' "${#long}"

timeout 600 "$wine" "$binary" serve tiny --port 0 --ctx 512 > "$work/address" 2> "$work/log" &
server=$!
address=
for _ in $(seq 600); do
    address=$(text < "$work/address" | grep -o 'http://127[0-9.]*:[0-9]*' || true)
    [ -n "$address" ] && break
    sleep 0.1
done
answer=$(curl -sS "$address/v1/completions" -H 'Content-Type: application/json' -d '{"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}')
printf '%s\n' "$answer"
case $answer in *'"text":'*) ;; *) fail "the server did not answer" ;; esac
printf '*** the program works under %s ***\n' "$("$wine" --version)"
