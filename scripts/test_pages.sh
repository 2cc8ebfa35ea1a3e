#!/usr/bin/env bash
# Runs a static AArch64 binary under a kernel whose pages are 16 KiB, in an emulated machine with a disk: in memory, streamed past the cache and
# through it, in both layouts, always to the same answer. Then the tests of crates, as `cargo test --no-run` built them.
#
#     scripts/test_pages.sh [--install] [--tests FILE …] BINARY
#
# --install   first unpacks Debian's kernel into target/pages, where this is Debian
# --tests     of crates that the size of pages matters to: st-sys, st-experts
#
# It needs qemu-system-aarch64, cpio and mkfs.ext4, and says SKIPPED where they are missing. One run takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
binary= install= tests=()
while [ $# -gt 0 ]; do
    case $1 in
    --install) install=1 ;;
    --tests) while [ $# -gt 2 ]; do tests+=("$2"); shift; done ;;
    *) binary=$1 ;;
    esac
    shift
done
[ -n "$binary" ] || { sed -n '2,10p' "$0"; exit 2; }
place=$PWD/target/pages
skip() { printf '\n*** SKIPPED: pages of 16 KiB were not tried: %s ***\n\n' "$1"; exit 0; }

install_kernel() {
    compgen -G "$place/kernel/boot/vmlinuz-*" >/dev/null && return
    dpkg --add-architecture arm64 && apt-get -q update &&
        apt-get -q -y install --no-install-recommends qemu-system-arm cpio e2fsprogs xz-utils || return
    local image
    image=$(apt-cache depends linux-image-6.12-arm64-16k:arm64 | sed -n 's/.*Depends: \(linux-image-[^:]*\).*/\1/p' | head -1)
    mkdir -p "$place/debs"
    (cd "$place/debs" && apt-get -q download "$image:arm64" busybox-static:arm64 2>/dev/null) || return
    for deb in "$place"/debs/*.deb; do dpkg -x "$deb" "$place/kernel"; done
    rm -r "$place/debs"
}

[ -z "$install" ] || install_kernel >&2 || true
for tool in qemu-system-aarch64 cpio mkfs.ext4 xz; do command -v $tool >/dev/null || skip "$tool is missing"; done
kernel=$(compgen -G "$place/kernel/boot/vmlinuz-*" | head -1) || skip "there is no kernel with such pages"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,proc,sys,dev,disk,modules} "$work/disk"
install -m 755 "$place/kernel/bin/busybox" "$root/bin/busybox"
# What the disk needs, in the order in which it needs it.
n=10
for module in lib/crc16 crypto/crc32c_generic lib/libcrc32c fs/mbcache fs/jbd2/jbd2 fs/ext4/ext4 drivers/block/virtio_blk; do
    file=$(compgen -G "$place/kernel/lib/modules/*/kernel/$module.ko.xz" || true)
    [ -z "$file" ] || xz -dc "$file" > "$root/modules/$n-${module##*/}.ko"
    n=$((n + 1))
done
cat > "$root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod "$module" || echo "$module was not loaded"; done
mount -t ext4 /dev/vda /disk && cd /disk && export HOME=/disk TMPDIR=/disk && sh ./try
echo "ended: $?"
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) > "$work/initrd"

install -m 755 "$binary" "$work/disk/st-tool"
cp models/tiny/tiny-q4_0.gguf "$work/disk/model.gguf"
cat > "$work/disk/try" <<'TRY'
set -e
fail() { echo "error: $1"; exit 1; }
[ "$(printf '%d' "0x$(od -A n -t x8 /proc/self/auxv | awk '$1 == "0000000000000006" { print $2 }')")" = 16384 ] || fail "the pages are not of 16 KiB"
./st-tool --version
ask() { ./st-tool run "$@" --temp 0 -n 20 -q --ctx 512 -p "Tell me a story about a brave fox named Lily."; }
whole=$(ask model.gguf)
echo "$whole"
[ -n "$whole" ] || fail "no answer"
./st-tool layout -q model.gguf packed.gguf --to offload
for model in model.gguf packed.gguf; do
    [ "$(ask $model)" = "$whole" ] || fail "$model says something else"
    for io in direct buffered; do
        [ "$(ask $model --memory 48MiB --io $io)" = "$whole" ] || fail "$model streamed ($io) says something else"
    done
done
echo "pages of 16 KiB: the same answer in memory, streamed past the cache and through it, in both layouts"
for test in tests/*; do
    [ ! -f "$test" ] || lib/ld-linux-aarch64.so.1 --library-path lib "$test" --test-threads 2 || fail "$test"
done
echo "all was tried"
TRY
if [ ${#tests[@]} -gt 0 ]; then
    mkdir "$work/disk/tests" "$work/disk/lib"
    cp "${tests[@]}" "$work/disk/tests"
    for library in ld-linux-aarch64.so.1 libc.so.6 libm.so.6 libgcc_s.so.1; do
        cp "$(aarch64-linux-gnu-gcc -print-file-name=$library)" "$work/disk/lib"
    done
fi
truncate -s 1G "$work/image"
mkfs.ext4 -q -d "$work/disk" "$work/image"
timeout 3000 qemu-system-aarch64 -M virt -cpu "${CPU:-max}" -smp 2 -m 1024 -nographic -no-reboot -net none -kernel "$kernel" -initrd "$work/initrd" \
    -append "console=ttyAMA0 quiet panic=-1 loglevel=4" -drive "file=$work/image,format=raw,if=none,id=disk,cache=none" -device virtio-blk-pci,drive=disk \
    < /dev/null | tr -d '\r' | tee "$work/said"
grep -q '^all was tried' "$work/said"
