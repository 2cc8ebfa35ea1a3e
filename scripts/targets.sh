# Sourced by the scripts that build for other systems: how cargo builds for a target with what is installed here.
#
#     use_target TARGET    sets up the environment, and `cargo_flags` to put behind the cargo command; where it cannot, it sets `missing` to
#                          the reason and fails
#
# rustup's target is taken where it is installed. Otherwise the standard library is built from its sources, with Debian's compiler
# (`rustc-web` and `rust-web-src`), which `unpack_debian_rust` puts into target/debian-rust: a library fits only the compiler that
# it was made with. Then RUSTC_BOOTSTRAP=1 lets a stable compiler do it.

debian_rust=$PWD/target/debian-rust
cargo_flags=()
missing=

has_rustup_target() { rustup target list --installed 2>/dev/null | grep -qx "$1"; }

# Debian's compiler, with the library for this machine and the library's sources. Needs a Debian that has them.
unpack_debian_rust() {
    [ -x "$debian_rust/rustc" ] && return
    local version llvm debs=$debian_rust/debs
    version=$(apt-cache depends libstd-rust-web-dev | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\).*/\1/p' | head -1)
    llvm=$(apt-cache depends "$version" | sed -n 's/.*Depends: \(libllvm[0-9.]*\).*/\1/p' | head -1)
    [ -n "$version" ] && [ -n "$llvm" ] || return 1
    mkdir -p "$debs"
    (cd "$debs" && apt-get -q download rustc-web rust-web-src "$version" "$llvm" libstd-rust-web-dev 2>/dev/null) || return
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$debian_rust"; done
    rm -r "$debs"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$debian_rust/usr/lib/x86_64-linux-gnu" "$debian_rust/usr/bin/rustc" > "$debian_rust/rustc"
    chmod +x "$debian_rust/rustc"
}

# The end of an environment variable's name that belongs to a target.
upper() { printf '%s' "$1" | tr 'a-z-' 'A-Z_'; }
lower() { printf '%s' "$1" | tr '-' '_'; }

# The library's sources, beside the compiler that they belong to.
from_sources() {
    [ -x "$debian_rust/rustc" ] || { missing="neither rustup's target $1 nor a compiler with the library's sources is there"; return 1; }
    export RUSTC=$debian_rust/rustc RUSTC_BOOTSTRAP=1
    cargo_flags+=(-Z build-std=std,panic_abort)
}

need() {
    command -v "$1" >/dev/null || { missing="$1 is missing"; return 1; }
}

use_target() {
    local target=$1 linker=
    [ "${RUSTC:-}" != "$debian_rust/rustc" ] || unset RUSTC RUSTC_BOOTSTRAP
    cargo_flags=(--target "$target")
    missing=
    has_rustup_target "$target" || from_sources "$target" || return 1
    case $target in
    x86_64-pc-windows-gnu)
        linker=x86_64-w64-mingw32-gcc
        need "$linker" || return 1
        [ -n "${RUSTC_BOOTSTRAP:-}" ] && windows_objects
        ;;
    aarch64-unknown-linux-gnu)
        linker=aarch64-linux-gnu-gcc
        need "$linker" || return 1
        ;;
    *-unknown-linux-musl)
        [ "${target%%-*}" = "$(uname -m)" ] || { missing="musl's compiler is only there for this machine's processor"; return 1; }
        need musl-gcc || return 1
        export "CC_$(lower "$target")=musl-gcc"
        [ -n "${RUSTC_BOOTSTRAP:-}" ] && musl_libraries "$target" && linker=musl-gcc
        ;;
    x86_64-pc-windows-msvc)
        export CARGO_TARGET_X86_64_PC_WINDOWS_MSVC_RUSTFLAGS="-C target-feature=+crt-static"
        ;;
    esac
    [ -z "$linker" ] || export "CARGO_TARGET_$(upper "$target")_LINKER=$linker"
    return 0
}

# The two objects that Windows programs begin and end with, which are no crates.
windows_objects() {
    local sysroot objects object
    sysroot=$("$RUSTC" --print sysroot)
    objects=$sysroot/lib/rustlib/x86_64-pc-windows-gnu/lib
    mkdir -p "$objects"
    for object in rsbegin rsend; do
        [ -f "$objects/$object.o" ] || "$RUSTC" --target x86_64-pc-windows-gnu --cfg bootstrap --emit=obj -o "$objects/$object.o" \
            "$sysroot/lib/rustlib/src/rust/library/rtstartup/$object.rs"
    done
}

# musl and its start files are those of the system then, and gcc's unwinder stands for LLVM's.
musl_libraries() {
    mkdir -p target/musl-lib
    cp "$(gcc -print-file-name=libgcc_eh.a)" target/musl-lib/libunwind.a
    export "CARGO_TARGET_$(upper "$1")_RUSTFLAGS=-C link-self-contained=no -C relocation-model=static \
-L native=$PWD/target/musl-lib -L native=/usr/lib/${1%%-*}-linux-musl"
}
