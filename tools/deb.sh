#!/bin/bash
# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0
#
# `make deb`: dist/forebay_VERSION_ARCH.deb. It carries an environment of its own, of the versions in requirements.lock
# and requirements-stage.lock, so it installs without a network; for the Python of the distribution that it is built on.
# VERSION=... names another version, MAINTAINER="NAME <MAIL>" who packs it, OUT=DIR another place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "deb: $*" >&2; exit 1; }

PYTHON=/usr/bin/python3
OUT=${OUT:-dist}
WORK=$(realpath -m "${WORK:-build/deb}")
ROOT=$WORK/root
ENVIRONMENT=$ROOT/usr/lib/forebay/venv
NAME=forebay
VERSION=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' gateway/forebay/__init__.py)}
MAINTAINER=${MAINTAINER:-Forebay developers <forebay@localhost>}
ARCH=$(dpkg --print-architecture)
python=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
next=$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1] + 1}")')

command -v dpkg-deb >/dev/null || fail "dpkg-deb is missing: a package for Debian is built on Debian"
[ -n "$VERSION" ] || fail "gateway/forebay/__init__.py names no version"
[ -x "${VENV:-.venv}/bin/python" ] || fail "run make setup first"

rm -rf "$ROOT"
mkdir -p "$WORK" "$OUT"
env -u ENVIRONMENT DESTDIR="$ROOT" PREFIX=/usr tools/install.sh install
# What builds an environment, and what it noted, has no use in one that is only run.
rm -rf "$ENVIRONMENT"/.forebay-install "$ENVIRONMENT"/bin/{pip*,[aA]ctivate*} \
    "$ENVIRONMENT"/lib/python*/site-packages/{pip,setuptools,pip-*,setuptools-*,_distutils_hack,distutils-precedence.pth}
# Compiled where it is installed.
find "$ENVIRONMENT" -name __pycache__ -prune -exec rm -rf {} +
find "$ENVIRONMENT" -name '*.so*' -type f -exec strip --strip-unneeded {} +

"${VENV:-.venv}/bin/python" tools/manpages.py "$ROOT/usr/share/man" >/dev/null
find "$ROOT/usr/share/man" -type f -exec gzip -9n {} +
doc=$ROOT/usr/share/doc/$NAME
sed "s/@NAME@/$NAME/" packaging/debian/copyright >"$doc/copyright"
{
    echo "$NAME ($VERSION) unstable; urgency=medium"
    printf '\n  * What has changed is in %s.\n\n' "${doc#"$ROOT"}/CHANGELOG.md"
    echo " -- $MAINTAINER  $(date -R)"
} | gzip -9n >"$doc/changelog.gz"
install -D -m 644 packaging/debian/lintian-overrides "$ROOT/usr/share/lintian/overrides/$NAME"
rm -f "$doc/LICENSE"

mkdir -p "$ROOT/DEBIAN"
for script in postinst prerm postrm; do
    install -m 755 "packaging/debian/$script" "$ROOT/DEBIAN/$script"
done
(cd "$ROOT" && find etc -type f -printf '/%p\n' | sort) >"$ROOT/DEBIAN/conffiles"
(cd "$ROOT" && find usr -type f -printf '%p\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
cat >"$ROOT/DEBIAN/control" <<END
Package: $NAME
Version: $VERSION
Architecture: $ARCH
Maintainer: $MAINTAINER
Installed-Size: $(du -sk --exclude=DEBIAN "$ROOT" | cut -f1)
Depends: python3 (>= $python), python3 (<< $next), systemd, libc6, libstdc++6
Recommends: python3-pyfuse3, fuse3, python3-libnbd, qemu-system-common | qemu-utils
Suggests: nbdkit, nbdkit-plugin-python, libvirt-daemon-system, lvm2
Section: admin
Priority: optional
Description: VM disk images on shared storage through a local cache
 One service for each hypervisor: it serves the images of an NFS or GPFS mount to
 the VMs of this host as NBD block devices, through a persistent cache on a
 local logical volume or file. Each disk has a mode of its own, from read-only
 over write-through to write-back; overlays share what they read.
END
chmod -R u+rwX,go+rX,go-w "$ROOT"
file=$OUT/${NAME}_${VERSION}_$ARCH.deb
dpkg-deb --root-owner-group -Zxz --build "$ROOT" "$file" >/dev/null
echo "deb: $file"
