#!/usr/bin/env bash
# Builds st-kernels for AArch64 and runs its tests under emulation: a CPU without dot products (Cortex-A72), one with them (Cortex-A76), one with
# i8mm (Neoverse V1), and all that the emulator has (max).
#
#     scripts/test_aarch64.sh            # installs nothing; says SKIPPED where tools are missing
#     scripts/test_aarch64.sh --install  # first installs what is missing, where this is Debian and the user is root
#
# QEMU names the emulator, by default qemu-aarch64-static. That of version 7.2 lacks Neoverse V1, that of 10.0 has it.
# It needs an AArch64 standard library, a linker and qemu-user. The library is rustup's target where that is installed. Otherwise it is
# Debian's own compiler, unpacked into target/aarch64-rust: a library fits only the compiler that it was made with.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
qemu=${QEMU:-qemu-aarch64-static}
unpacked=$PWD/target/aarch64-rust

skip() {
    printf '\n*** SKIPPED: the AArch64 kernels were neither built nor tested: %s ***\n\n' "$1"
    exit 0
}

has_rustup_target() { rustup target list --installed 2>/dev/null | grep -qx "$target"; }

install_tools() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    command -v "$qemu" >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null ||
        { apt-get -q update && apt-get -q -y install --no-install-recommends qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross; } || return 0
    has_rustup_target || unpack_debian_rust || true
}

# Debian's compiler with its libraries for this machine and for AArch64.
unpack_debian_rust() {
    [ -x "$unpacked/rustc" ] && return
    dpkg --add-architecture arm64 && apt-get -q update || return
    local version debs=$unpacked/debs
    version=$(apt-cache depends libstd-rust-web-dev | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\).*/\1/p' | head -1)
    local llvm
    llvm=$(apt-cache depends "$version" | sed -n 's/.*Depends: \(libllvm[0-9.]*\).*/\1/p' | head -1)
    mkdir -p "$debs"
    (cd "$debs" && apt-get -q download rustc-web "$version" "$llvm" libstd-rust-web-dev "libstd-rust-web-dev:arm64" 2>/dev/null) || return
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$unpacked"; done
    rm -r "$debs"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$unpacked/usr/lib/x86_64-linux-gnu" "$unpacked/usr/bin/rustc" > "$unpacked/rustc"
    chmod +x "$unpacked/rustc"
}

[ "${1:-}" = --install ] && install_tools >&2
command -v "$qemu" >/dev/null || skip "$qemu is missing"
command -v aarch64-linux-gnu-gcc >/dev/null || skip "aarch64-linux-gnu-gcc is missing"
if ! has_rustup_target; then
    [ -x "$unpacked/rustc" ] || skip "there is no standard library for $target"
    export RUSTC=$unpacked/rustc
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# It lists them, and fails.
models=$("$qemu" -cpu help || true)
for cpu in cortex-a72 cortex-a76 neoverse-v1 max; do
    grep -qw "$cpu" <<< "$models" || { printf '*** SKIPPED: %s, which this emulator lacks ***\n' "$cpu"; continue; }
    printf '*** st-kernels on an emulated %s ***\n' "$cpu"
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -L /usr/aarch64-linux-gnu -cpu $cpu" \
        timeout 1200 cargo test --locked --package st-kernels --lib --tests --target "$target" --target-dir target/aarch64
done
