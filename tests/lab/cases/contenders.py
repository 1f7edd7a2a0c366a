# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an image on NFS can be used through on a host: Forebay, the kernel's block caches over a loop device, others.

Each has an image of its own, named after its key, which anybody may read and write: root is nobody on the server.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.hosts import MOUNT, Host, until
from lab.models import SERVER, address

CACHED = "96M"
"""Size of the volumes that dm-cache and bcache have for the data."""

BCACHE_TAKES_ALL = """
for each in /sys/block/bcache0/bcache/sequential_cutoff /sys/fs/bcache/*-*/congested_*_threshold_us; do
  echo 0 >$each
done"""
"""What is sequential goes past it otherwise, and all of it while the cache is slow, as it is here."""

CACHED_FILES = "/mnt/fsc"
"""Where the store is mounted a second time, for FS-Cache."""


@dataclass(frozen=True)
class Contender:
    """One way to use an image, once `begins` was called; what is not overridden is that of the plain file."""

    key: str
    title: str
    buffered: bool = False
    """Whether it is of use by way of the page cache only."""

    data_at: int = 0
    """Bytes at the start of the image that are not the guest's."""

    @property
    def image(self) -> str:
        return f"{self.key}.raw"

    @property
    def path(self) -> str:
        """The image, on a host."""
        return f"{MOUNT}/images/{self.image}"

    def begins(self, host: Host) -> None:
        """Set it up on that host, for the first time."""

    def again(self, host: Host) -> None:
        """Set it up once more after a power cut."""
        self.begins(host)

    def serves(self, host: Host) -> str:
        """The path of what a guest would use: a device, a file or a socket."""
        return self.path

    def ends(self, host: Host) -> None:
        """Give everything back."""

    def is_refused(self, other: Host) -> bool:
        """Whether another host is kept from using the same image in the same way, meanwhile."""
        return not other.run(f"losetup -f --show {self.path} && losetup -D")


@dataclass(frozen=True)
class Forebay(Contender):
    """A disk of the gateway."""

    mode: str = ""

    def begins(self, host: Host) -> None:
        host.attach(self.key, self.image, self.mode)

    def again(self, host: Host) -> None:
        """It comes back with the daemon."""
        host.until_state(self.key, "ready", 200.0)

    def serves(self, host: Host) -> str:
        return host.socket(self.key)

    def ends(self, host: Host) -> None:
        host.do(f"forebay detach {self.key}")

    def is_refused(self, other: Host) -> bool:
        return not other.run(f"forebay attach {self.key} images:{self.image} --mode {self.mode}")


def looped(host: Host, contender: Contender) -> str:
    """A loop device on the image, with direct I/O."""
    command = f"losetup --direct-io=on -f --show {contender.path}"
    return host.do(command).split()[-1]


@dataclass(frozen=True)
class DmCache(Contender):
    """What lvmcache sets up, over a loop device on the file."""

    def _volume(self, what: str) -> str:
        return f"/dev/vg0/{self.key}_{what}"

    def begins(self, host: Host) -> None:
        host.do(f"lvcreate -qq -y -Wy -L 8M -n {self.key}_meta vg0")
        host.do(f"lvcreate -qq -y -Wy -L {CACHED} -n {self.key}_data vg0")
        host.do(f"dd if=/dev/zero of={self._volume('meta')} bs=1M count=1 conv=fsync")
        self.again(host)

    def again(self, host: Host) -> None:
        device = looped(host, self)
        host.do("modprobe -a dm-cache dm-cache-smq")
        volumes = f"{self._volume('meta')} {self._volume('data')} {device}"
        host.do(
            f"dmsetup create {self.key} --table"
            f' "0 $(blockdev --getsz {device}) cache {volumes} 128 1 writeback smq 0"'
        )

    def serves(self, host: Host) -> str:
        return f"/dev/mapper/{self.key}"

    def ends(self, host: Host) -> None:
        host.do(f"dmsetup remove {self.key}; losetup -D")
        host.do(f"lvremove -qq -y vg0/{self.key}_meta vg0/{self.key}_data")


@dataclass(frozen=True)
class Bcache(Contender):
    """Over a loop device on the file, which gets a head of bcache's own."""

    def _register(self, host: Host, device: str) -> None:
        for each in (f"/dev/vg0/{self.key}", device):
            # udev may have been faster
            host.run(f"echo $(readlink -f {each}) >/sys/fs/bcache/register")
        until("bcache0", lambda: host.run("test -b /dev/bcache0"), 60.0)
        host.do(BCACHE_TAKES_ALL)

    def begins(self, host: Host) -> None:
        host.do(f"modprobe bcache; lvcreate -qq -y -Wy -L {CACHED} -n {self.key} vg0")
        device = looped(host, self)
        made = f"-C /dev/vg0/{self.key} -B {device} --writeback"
        host.do(f"wipefs -qa /dev/vg0/{self.key} {device}")
        host.do(f"make-bcache --block 4k --bucket 64k {made}")
        self._register(host, device)

    def again(self, host: Host) -> None:
        host.do("modprobe bcache")
        self._register(host, looped(host, self))

    def serves(self, host: Host) -> str:
        return "/dev/bcache0"

    def ends(self, host: Host) -> None:
        host.do("echo 1 >/sys/block/bcache0/bcache/stop")
        host.run("for each in /sys/fs/bcache/*-*/stop; do echo 1 >$each; done; sleep 3; losetup -D")


@dataclass(frozen=True)
class Served(Contender):
    """A server of NBD beside the gateway."""

    command: str = ""
    """Of the server, with {socket} and {path}."""

    def _command(self, name: str) -> str:
        return self.command.format(socket=name, path=self.path)

    def begins(self, host: Host) -> None:
        name = self.serves(host)
        host.do(f"{self._command(name)} </dev/null >/dev/null 2>&1")
        until(f"{self.key}'s socket", lambda: host.run(f"test -S {name}"), 60.0)

    def serves(self, host: Host) -> str:
        return f"/run/{self.key}.sock"

    def ends(self, host: Host) -> None:
        host.do(f"kill $(cat {self.serves(host)}.pid)")

    def is_refused(self, other: Host) -> bool:
        name = self.serves(other)
        other.run(f"{self._command(name)} </dev/null >/dev/null 2>&1", 30.0)
        return not other.run(f"qemu-img info 'nbd+unix:///?socket={name}'", 30.0)


@dataclass(frozen=True)
class FsCache(Contender):
    """The kernel's cache of files of NFS, which goes past what is read with O_DIRECT."""

    @property
    def path(self) -> str:
        return f"{CACHED_FILES}/images/{self.image}"

    def begins(self, host: Host) -> None:
        host.do(
            f"lvcreate -qq -y -Wy -L 256M -n {self.key} vg0 && mkfs.ext4 -q /dev/vg0/{self.key}"
        )
        self.again(host)

    def again(self, host: Host) -> None:
        server = address(SERVER, host.machine.model.wires[0])
        host.do(f"mkdir -p /var/cache/fscache {CACHED_FILES}; modprobe cachefiles")
        host.do(f"mount -o user_xattr /dev/vg0/{self.key} /var/cache/fscache")
        host.do("echo RUN=yes >>/etc/default/cachefilesd; systemctl start cachefilesd")
        host.do("systemctl is-active cachefilesd")
        options = "vers=4.2,hard,fsc,nosharecache"
        host.do(f"mount -t nfs -o {options} {server}:/srv/store {CACHED_FILES}")
        host.do(f"ls {CACHED_FILES}/images")

    def ends(self, host: Host) -> None:
        host.do(f"umount {CACHED_FILES}; systemctl stop cachefilesd; umount /var/cache/fscache")

    def is_refused(self, other: Host) -> bool:
        return not other.run(f"losetup -f --show {MOUNT}/images/{self.image} && losetup -D")


CONTENDERS: Sequence[Contender] = (
    Contender("plain", "the file on NFS, O_DIRECT"),
    Forebay("back", "Forebay, write-back", mode="write-back"),
    Forebay("through", "Forebay, write-through", mode="write-through"),
    DmCache("dmcache", "lvmcache (dm-cache, writeback) on a loop device"),
    Bcache("bcache", "bcache (writeback) on a loop device", data_at=8192),
    Served(
        "qemunbd",
        "qemu-nbd",
        command="qemu-nbd --fork --pid-file={socket}.pid -t -f raw -k {socket} {path}",
    ),
    Served(
        "nbdkit",
        "nbdkit, cache filter (writeback)",
        command="nbdkit -U {socket} -P {socket}.pid --filter=cache file {path}"
        " cache=writeback cache-on-read=true",
    ),
    FsCache("fscache", "FS-Cache (cachefilesd), buffered", buffered=True),
)
