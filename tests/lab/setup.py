# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is done once on machines that have just booted, before their state is saved."""

from lab.hosts import LEASE_SECONDS, STORE, Host, Server


def set_up_server(server: Server) -> None:
    """An export with root_squash on a file system of its own, with quotas."""
    server.do("mkfs.ext4 -q -O quota /dev/vdb && mkdir -p /srv/store")
    server.do("echo '/dev/vdb /srv/store ext4 usrquota 0 2' >>/etc/fstab; systemctl daemon-reload")
    server.do(f"mount /srv/store && install -d -o forebay -g forebay {STORE}")
    server.do("echo '/srv/store 10.9.0.0/16(rw,sync,no_subtree_check)' >/etc/exports")
    times = f"lease-time={LEASE_SECONDS}\\ngrace-time={LEASE_SECONDS}\\nthreads=4"
    server.do(f"mkdir -p /etc/nfs.conf.d; printf '[nfsd]\\n{times}\\n' >/etc/nfs.conf.d/lab.conf")
    server.do("systemctl enable --now nfs-server")


def set_up_host(host: Host) -> None:
    """The store mounted, the product's units installed, a cache on a logical volume, the daemon running."""
    host.do("cd /opt/forebay && make install", 600.0)
    host.mount("vers=4.2")
    host.do("pvcreate -q /dev/vdb && vgcreate -q vg0 /dev/vdb")
    host.configure()
    host.do("forebay cache create --vg vg0 --size 400M", 300.0)
    host.do("systemctl enable --now forebay", 300.0)
    host.do("forebay status --json; modprobe nbd nbds_max=4")
