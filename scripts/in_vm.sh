#!/usr/bin/env bash
# Runs a command as root under another kernel: in a virtual machine that sees these files, and keeps no change to them.
# So the tests of tests/cluster/test_namespaces.py get netem where the machine's own kernel has none.
#
# Usage: scripts/in_vm.sh KERNEL COMMAND...
#
# KERNEL is the folder of an unpacked kernel package, with 9p as a module (of Debian's, not the -cloud ones):
#     apt-get download linux-image-6.1.0-56-amd64 && dpkg-deb -x linux-image-6.1.0-56-amd64_*.deb KERNEL
# Needs qemu-system-x86 and busybox-static. VM_ACCEL: tcg, which emulates the processor, or kvm; VM_CPUS, VM_MEMORY.
# The command has no network but what it makes. Files that change meanwhile may be seen half old, half new.
set -euo pipefail

(( $# > 1 )) || { sed -n 's/^# Usage/Usage/p' "$0" >&2; exit 2; }
release=$(basename "$1"/lib/modules/*)
modules=$(realpath "$1/lib/modules/$release")
image=$(realpath "$1/boot/vmlinuz-$release")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
root=$scratch/root

{
    printf 'cd %q; export HOME=/root PATH=%q\n' "$PWD" "$PATH"
    printf '%q ' "${@:2}"
    printf '\necho "exit code: $?"\n'
} >"$scratch/job"

# The first root: modules, for the kernel to load as it needs them, and just enough tools to reach the second one.
mkdir -p "$root"/{bin,sbin,proc,machine} "$root/lib/modules/$release"
cp "$(command -v busybox)" "$root/bin/busybox"
for tool in bin/{sh,mount,mkdir,chroot,poweroff,ip} sbin/modprobe; do ln -s /bin/busybox "$root/$tool"; done
(cd "$modules" && cp -r --parents modules.* kernel/net kernel/drivers/virtio kernel/drivers/net/{veth,tun}.ko* \
    kernel/fs/{9p,fscache,netfs,overlayfs} "$root/lib/modules/$release")
busybox depmod -b "$root" "$release"
cat >"$root/init" <<INIT
#!/bin/sh
mount -t proc proc /proc
for module in virtio_pci 9pnet_virtio 9p overlay tun; do modprobe \$module; done
mount -t tmpfs -o size=100% changes /machine
mkdir /machine/files /machine/upper /machine/work /machine/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose files /machine/files
mount -t overlay -o lowerdir=/machine/files,upperdir=/machine/upper,workdir=/machine/work root /machine/root
cd /machine/root
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/shm dev/pts
mount -t tmpfs shm dev/shm
mount -t devpts pts dev/pts
mount -t tmpfs run run
ip link set lo up
chroot . /bin/bash "$scratch/job"
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$scratch/initrd"

qemu-system-x86_64 -accel "${VM_ACCEL:-tcg}" -cpu max -smp "${VM_CPUS:-2}" -m "${VM_MEMORY:-6G}" -nic none -no-reboot \
    -nographic -virtfs local,path=/,mount_tag=files,security_model=none,readonly=on,multidevs=remap \
    -kernel "$image" -initrd "$scratch/initrd" -append "console=ttyS0 quiet panic=-1" </dev/null |
    sed -u 's/\r$//' | tee "$scratch/log"
code=$(sed -n 's/^exit code: //p' "$scratch/log" | tail -n 1)
exit "${code:-1}"
