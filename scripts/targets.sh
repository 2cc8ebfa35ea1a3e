# Sourced by the scripts that build for other systems: how cargo builds for a target with what is installed here.
#
#     use_target TARGET    sets up the environment, and `cargo_flags` to put behind the cargo command; where it cannot, it sets `missing` to
#                          the reason and fails
#
# rustup's target is taken where it is installed. Otherwise the standard library is built from its sources, with Debian's compiler
# (`rustc-web` and `rust-web-src`), which `unpack_debian_rust` puts into target/debian-rust: a library fits only the compiler that
# it was made with. Then RUSTC_BOOTSTRAP=1 lets a stable compiler do it. Another processor's musl is Debian's, too, which
# `unpack_debian_musl` puts into target/debian-musl.

debian_rust=$PWD/target/debian-rust
debian_musl=$PWD/target/debian-musl
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

# musl for AArch64. Its specs name the places where they would be installed. Needs a Debian.
unpack_debian_musl() {
    local specs=$debian_musl/usr/lib/aarch64-linux-musl/musl-gcc.specs
    [ -f "$specs" ] && return
    dpkg --add-architecture arm64 && apt-get -q update || return
    mkdir -p "$debian_musl"
    (cd "$debian_musl" && apt-get -q download musl-dev:arm64 2>/dev/null) || return
    dpkg -x "$debian_musl"/musl-dev_*_arm64.deb "$debian_musl"
    rm "$debian_musl"/musl-dev_*_arm64.deb
    sed -i "s|/usr/|$debian_musl/usr/|g" "$specs"
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
        musl_compiler "$target" || return 1
        export "CC_$(lower "$target")=$musl_gcc"
        [ -n "${RUSTC_BOOTSTRAP:-}" ] && musl_libraries "$target" && linker=$musl_gcc
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

# A compiler that finds musl instead of glibc, in $musl_gcc: the system's for this machine's processor, else one with Debian's musl.
musl_compiler() {
    local processor=${1%%-*}
    musl_root=
    if [ "$processor" = "$(uname -m)" ]; then
        musl_gcc=musl-gcc real_gcc=gcc
        need musl-gcc
        return
    fi
    musl_root=$debian_musl musl_gcc=$debian_musl/$processor-gcc real_gcc=$processor-linux-gnu-gcc
    need "$real_gcc" || return 1
    local specs=$musl_root/usr/lib/$processor-linux-musl/musl-gcc.specs
    [ -f "$specs" ] || { missing="musl is not there for $processor"; return 1; }
    printf '#!/bin/sh\nexec %s "$@" -specs %s\n' "$real_gcc" "$specs" > "$musl_gcc"
    chmod +x "$musl_gcc"
}

# musl and its start files are Debian's then, and gcc's unwinder stands for LLVM's, with the one function that it has of glibc.
musl_libraries() {
    local processor=${1%%-*}
    local libraries=$PWD/target/musl-lib/$processor
    mkdir -p "$libraries"
    cp "$("$real_gcc" -print-file-name=libgcc_eh.a)" "$libraries/libunwind.a"
    "$musl_gcc" -O2 -c -o "$libraries/find_object.o" packaging/find_object.c
    ar r "$libraries/libunwind.a" "$libraries/find_object.o"
    export "CARGO_TARGET_$(upper "$1")_RUSTFLAGS=-C link-self-contained=no -C relocation-model=static \
-L native=$libraries -L native=$musl_root/usr/lib/$processor-linux-musl"
}
