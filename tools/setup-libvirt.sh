#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# What tests/real/test_libvirt.py needs beyond `make setup`, about 300 MB: libvirt and QEMU, the boot loader and busybox
# that its guest is made of, and a kernel for the guest, which is unpacked into .lab/kernel and not installed. Services
# that the packages bring are not needed: the tests run a libvirtd of their own. The second run finds nothing to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PACKAGES=(libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu qemu-system-x86 virtinst
          busybox-static syslinux syslinux-common mtools e2fsprogs)
KERNEL=linux-image-cloud-amd64      # a name without a version, for the one that Debian has now
PLACE=.lab/kernel

fail() { echo "setup-libvirt: $*" >&2; exit 1; }

command -v apt-get >/dev/null || fail "no apt-get here; install the equivalents of: ${PACKAGES[*]}"
root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "run as root, or install these first: ${PACKAGES[*]}"
    root=(sudo)
fi

missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup-libvirt: installing ${missing[*]}"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >/dev/null
fi

if ! ls $PLACE/boot/vmlinuz-* >/dev/null 2>&1; then
    image=$(apt-cache depends "$KERNEL" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$image" ] || fail "apt knows no $KERNEL: try apt-get update"
    echo "setup-libvirt: fetching $image for the guest"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get download -qq "$image" 2>/dev/null) || fail "$image could not be fetched"
    mkdir -p .lab
    dpkg -x "$work"/linux-image-*.deb "$work/kernel"
    rm -rf $PLACE
    mv "$work/kernel" $PLACE
fi
echo "setup-libvirt: ready: make test PYTEST_ARGS='-k libvirt'"
