#!/usr/bin/env bash
# Builds the program for one system and packs it: an archive for everybody, a .deb for Debian and its kin, and their checksums.
#
#     scripts/package.sh TARGET [--install] [--binary FILE]
#
# TARGET: x86_64-linux, aarch64-linux (static, with musl where its library is to be had, else with glibc), x86_64-windows,
#         aarch64-macos, x86_64-macos, universal-macos (of the two others' binaries, on a Mac)
# --install       first unpacks Debian's compiler and musl into target/, where this is Debian and rustup has no such target
# --binary FILE   packs this one instead of building. Pages and completions are made by it, or by the program that ST_TOOL names where
#                 this machine cannot run it.
#
# Everything goes to target/dist. The same commit gives the same archive: times are those of the commit, names are sorted.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/targets.sh

name=${1:?a target, such as x86_64-linux}
shift
binary= install=
while [ $# -gt 0 ]; do
    case $1 in
    --install) install=1 ;;
    --binary) binary=${2:?a file}; shift ;;
    *) printf 'error: no such option: %s\n' "$1" >&2; exit 2 ;;
    esac
    shift
done
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
dist=$PWD/target/dist
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || echo 0)}"
export SOURCE_DATE_EPOCH

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

# Builds TARGET; the binary's place is in $binary then.
build() {
    local target=$1 suffix=${2:-}
    if [ -n "$install" ] && ! has_rustup_target "$target"; then
        unpack_debian_rust >&2 || true
        case $target in aarch64-*-musl) unpack_debian_musl >&2 || true ;; esac
    fi
    use_target "$target" || return 1
    export CARGO_PROFILE_RELEASE_STRIP=symbols
    cargo build --locked --release --package st-tool "${cargo_flags[@]}" --target-dir target/cross || exit 1
    binary=target/cross/$target/release/st-tool$suffix
}

# A Linux binary that needs nothing of the system that it runs on.
build_static() {
    build "$1-unknown-linux-musl" && return
    printf 'note: no musl for %s (%s); linking glibc statically\n' "$1" "$missing" >&2
    # Random numbers by the system's call: what is linked statically does not find glibc's function, and would want /dev/urandom.
    export "CARGO_TARGET_$(upper "$1-unknown-linux-gnu")_RUSTFLAGS=-C target-feature=+crt-static --cfg getrandom_backend=\"linux_getrandom\""
    build "$1-unknown-linux-gnu" || fail "$missing"
}

suffix=
if [ -z "$binary" ]; then
    case $name in
    x86_64-linux | aarch64-linux) build_static "${name%-linux}" ;;
    x86_64-windows) build x86_64-pc-windows-gnu .exe || build x86_64-pc-windows-msvc .exe || fail "$missing" ;;
    aarch64-macos | x86_64-macos) build "${name%-macos}-apple-darwin" || fail "$missing" ;;
    universal-macos)
        build aarch64-apple-darwin || fail "$missing"
        arm=$binary
        build x86_64-apple-darwin || fail "$missing"
        lipo -create -output target/cross/st-tool-universal "$arm" "$binary"
        binary=target/cross/st-tool-universal
        ;;
    *) fail "no such target: $name" ;;
    esac
fi
case $name in *-windows) suffix=.exe ;; esac

# What makes pages and completions: the binary itself, or one that this machine can run.
teller=${ST_TOOL:-$binary}
"$teller" --version >/dev/null 2>&1 || fail "this machine cannot run $teller; ST_TOOL=PATH names a program of the same commit that it can"

stem=st-tool-$version-$name
root=target/unpacked/$stem
rm -rf "$root"
mkdir -p "$root/man" "$root/completions" "$dist"
install -m 755 "$binary" "$root/st-tool$suffix"
install -m 644 README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$root"
"$teller" --quiet man "$root/man"
for shell in bash zsh fish elvish powershell; do "$teller" completions "$shell" > "$root/completions/st-tool.$shell"; done
chmod 644 "$root"/man/* "$root"/completions/*

# Sums of what this script made; those of other targets stay.
checksum() {
    local file=$1 sums=$dist/SHA256SUMS
    touch "$sums"
    grep -v "  $file\$" "$sums" > "$sums.new" || true
    if command -v sha256sum >/dev/null; then (cd "$dist" && sha256sum "$file"); else (cd "$dist" && shasum -a 256 "$file"); fi >> "$sums.new"
    LC_ALL=C sort -k 2 "$sums.new" > "$sums"
    rm "$sums.new"
    printf '%s\n' "$dist/$file"
}

# Entries of an archive have the commit's time and no owner.
stamp() { find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} + 2>/dev/null || find "$1" -exec touch -t "$(date -r "$SOURCE_DATE_EPOCH" +%Y%m%d%H%M.%S)" {} +; }

archive() {
    stamp "$root"
    case $name in
    *-windows)
        rm -f "$dist/$stem.zip"
        (cd "${root%/*}" && if command -v zip >/dev/null; then
            find "$stem" -print | LC_ALL=C sort | TZ=UTC zip -q -X "$dist/$stem.zip" -@
        elif command -v 7z >/dev/null; then
            7z a -bd "$dist/$stem.zip" "$stem" >/dev/null
        else
            python3 -c 'import shutil, sys; shutil.make_archive(sys.argv[1], "zip", ".", sys.argv[2])' "$dist/$stem" "$stem"
        fi)
        checksum "$stem.zip"
        ;;
    *)
        local sorted=()
        tar --version 2>/dev/null | grep -q GNU && sorted=(--sort=name --owner=0 --group=0 --numeric-owner "--mtime=@$SOURCE_DATE_EPOCH")
        tar -C "${root%/*}" "${sorted[@]}" -cf - "$stem" | gzip -n -9 > "$dist/$stem.tar.gz"
        checksum "$stem.tar.gz"
        ;;
    esac
}

# A package of Debian: the binary depends on nothing.
deb() {
    local arch=$1 tree=target/unpacked/deb-$1 shell
    rm -rf "$tree"
    mkdir -p "$tree/DEBIAN"
    install -D -m 755 "$binary" "$tree/usr/bin/st-tool"
    for page in "$root"/man/*.1; do
        mkdir -p "$tree/usr/share/man/man1"
        gzip -n -9 < "$page" > "$tree/usr/share/man/man1/${page##*/}.gz"
    done
    install -D -m 644 "$root/completions/st-tool.bash" "$tree/usr/share/bash-completion/completions/st-tool"
    install -D -m 644 "$root/completions/st-tool.zsh" "$tree/usr/share/zsh/vendor-completions/_st-tool"
    install -D -m 644 "$root/completions/st-tool.fish" "$tree/usr/share/fish/vendor_completions.d/st-tool.fish"
    install -D -m 644 packaging/copyright "$tree/usr/share/doc/st-tool/copyright"
    gzip -n -9 < CHANGELOG.md > "$tree/usr/share/doc/st-tool/changelog.gz"
    find "$tree/usr" -type d -exec chmod 755 {} +
    cat > "$tree/DEBIAN/control" <<EOF
Package: st-tool
Version: $version
Architecture: $arch
Maintainer: The st-tool authors <st-tool@users.noreply.github.com>
Installed-Size: $(du -k -s "$tree/usr" | cut -f1)
Section: science
Priority: optional
Homepage: https://github.com/st-tool/st-tool
Description: SmallThinker models on a CPU, with little memory and a disk
 st-tool takes the SmallThinker mixture-of-experts models from the Hugging
 Face hub to an answer in one program: it downloads, converts and runs them,
 at the terminal or over HTTP. Experts are read from the disk as the router
 chooses them, within a budget of memory that holds for the whole process.
EOF
    (cd "$tree" && find usr -type f | LC_ALL=C sort | xargs md5sum > DEBIAN/md5sums)
    stamp "$tree"
    dpkg-deb --root-owner-group -Zxz --build "$tree" "$dist/st-tool_${version}_$arch.deb" >/dev/null
    checksum "st-tool_${version}_$arch.deb"
}

archive
case $name in
x86_64-linux) ! command -v dpkg-deb >/dev/null || deb amd64 ;;
aarch64-linux) ! command -v dpkg-deb >/dev/null || deb arm64 ;;
esac
