# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""libtorrent, as staging uses it: no tracker, no DHT, no discovery, and no peer but the hosts that were named.

Its files are those of the FUSE mount. It writes a piece before it has checked it; what becomes of that is for the
daemon to decide, which compares each with the torrent itself.
"""

import ipaddress
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.errors import ForebayError

try:
    import libtorrent as lt
except ImportError as missing:
    raise ForebayError(
        f"libtorrent is not available ({missing}): install it into Forebay's environment, as docs/staging.md says"
    ) from None

SETTINGS: dict[str, Any] = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    # processor time is what a fast network lacks first: nothing is encrypted, docs/staging.md says so
    "out_enc_policy": 2,
    "in_enc_policy": 2,
    "anonymous_mode": True,
    # hosts come back when they do: they are tried for as long as they are named
    "max_failcount": 1 << 20,
    "min_reconnect_time": 1,
    "peer_connect_timeout": 5,
    "allow_multiple_connections_per_ip": True,
    "connections_limit": 400,
    "unchoke_slots_limit": 16,
    # the daemon has the only copy, and what it does not take is no error to who has mapped the file: it is never mapped
    "mmap_file_size_cutoff": 1 << 30,
    "no_atime_storage": False,
    "aio_threads": 4,
    "max_queued_disk_bytes": 16 << 20,
    "cache_size": 512,
    "file_pool_size": 80,
}
"""What is not as libtorrent has it by default."""

MOST_RATE = (1 << 31) - 1
"""Bytes a second: libtorrent takes no larger limit."""

KEPT_BYTES = 512 << 20
"""Of each image the kernel may keep about so much in memory, so that what came is given away without asking the daemon
for it. It is a second copy of what the cache has, and memory of a host is for its VMs."""

TROUBLE = ("file_error_alert", "torrent_error_alert", "fastresume_rejected_alert")
"""Alerts after which an image is begun anew."""


@dataclass(frozen=True)
class Figures:
    """How far one image is. Rates in bytes a second."""

    down: int
    up: int
    connected: int
    is_complete: bool
    received: int
    """Bytes, since it was added."""
    sent: int = 0
    """The same."""


class Engine:
    """One session."""

    def __init__(self, listen: str, port: int) -> None:
        """`listen` is an IP address."""
        at = f"[{listen}]:{port}" if ":" in listen else f"{listen}:{port}"
        mask = lt.alert.category_t.error_notification | lt.alert.category_t.storage_notification
        settings: Any = {**SETTINGS, "listen_interfaces": at, "alert_mask": mask}
        if not ipaddress.ip_address(listen).is_unspecified:
            settings["outgoing_interfaces"] = listen  # by which the others know this host
        self._session: Any = lt.session(settings)
        # a rate holds for hosts of the local network, too, which libtorrent leaves out by default
        everywhere = lt.ip_filter()
        everywhere.add_rule("0.0.0.0", "255.255.255.255", 1 << lt.session.global_peer_class_id)  # noqa: S104
        self._session.set_peer_class_filter(everywhere)
        self._handles: dict[str, Any] = {}
        self._held: dict[str, int] = {}
        """By image, a descriptor of its file: libtorrent closes files, and the daemon is to keep the image attached."""
        self._moved: dict[str, int] = {}
        """By image, bytes received and sent when the kernel kept nothing of its file last."""
        self._allowed: frozenset[str] = frozenset()
        self.allow(())

    def close(self) -> None:
        """Let all images go."""
        for image in list(self._handles):
            self.remove(image)
        self._session.pause()

    # -- who may connect

    def allow(self, addresses: Iterable[str]) -> None:
        """Have no peers but those at these IP addresses."""
        allowed = frozenset(addresses)
        if allowed == self._allowed and allowed:
            return
        rules = lt.ip_filter()
        rules.add_rule("0.0.0.0", "255.255.255.255", 1)  # noqa: S104
        rules.add_rule("::", str(ipaddress.IPv6Address((1 << 128) - 1)), 1)
        for address in allowed:
            rules.add_rule(address, address, 0)
        self._session.set_ip_filter(rules)
        self._allowed = allowed

    # -- images

    def images(self) -> list[str]:
        """Those that are staged."""
        return list(self._handles)

    def add(
        self,
        image: str,
        torrent: bytes,
        path: Path,
        lacking: Iterable[tuple[int, int]],
        rate: int | None,
    ) -> None:
        """Stage an image, whose file lies at `path`; `lacking` are the runs of pieces that are not there.

        Raises ForebayError for what is no torrent, or of the same content as another image: libtorrent would take both
        for one. Raises OSError where the mount does not give the file.
        """
        try:
            decoded: Any = lt.bdecode(torrent)
            info = lt.torrent_info(decoded)
        except (RuntimeError, TypeError) as fault:
            raise ForebayError(f"{image}: its torrent cannot be used: {fault}") from None
        same = [x for x, h in self._handles.items() if h.info_hashes() == info.info_hashes()]
        if same:
            raise ForebayError(
                f"{image} has the same content as {same[0]}: it is staged when that is ended"
            )
        have = [True] * info.num_pieces()
        for first, count in lacking:
            have[first : first + count] = [False] * count
        wanted = lt.add_torrent_params()
        wanted.ti = info
        wanted.save_path = str(path.parent)
        wanted.renamed_files = {0: path.name}
        wanted.have_pieces = have
        wanted.flags = (
            lt.torrent_flags.apply_ip_filter
            | lt.torrent_flags.disable_dht
            | lt.torrent_flags.disable_lsd
            | lt.torrent_flags.disable_pex
        )
        wanted.download_limit = wanted.upload_limit = _limit(rate)
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise RuntimeError("its file is none")
            handle = self._session.add_torrent(wanted)
        except BaseException as fault:
            os.close(held)
            if isinstance(fault, RuntimeError):
                raise ForebayError(f"{image} cannot be staged: {fault}") from None
            raise
        self._held[image], self._handles[image], self._moved[image] = held, handle, 0

    def remove(self, image: str) -> None:
        """Stage an image no more. Its file is closed soon."""
        self._forget_pages(image)
        os.close(self._held.pop(image))
        del self._moved[image]
        self._session.remove_torrent(self._handles.pop(image))

    def limit(self, image: str, rate: int | None) -> None:
        """Send, and receive, at most so many bytes a second of the image; None: as many as can be."""
        self._handles[image].set_upload_limit(_limit(rate))
        self._handles[image].set_download_limit(_limit(rate))

    def connect(self, image: str, address: str, port: int) -> None:
        """Have a peer, if there is none there."""
        self._handles[image].connect_peer((address, port))

    def figures(self, image: str) -> Figures:
        """How far an image is."""
        now = self._handles[image].status()
        return Figures(
            now.download_payload_rate,
            now.upload_payload_rate,
            now.num_peers,
            now.is_seeding,
            now.total_payload_download,
            now.total_payload_upload,
        )

    def bound_memory(self, image: str, figures: Figures) -> None:
        """Have the kernel keep no more of an image than it may, which has come so far."""
        moved = figures.received + figures.sent
        if moved - self._moved[image] > KEPT_BYTES:
            self._forget_pages(image)
            self._moved[image] = moved

    def _forget_pages(self, image: str) -> None:
        os.posix_fadvise(self._held[image], 0, 0, os.POSIX_FADV_DONTNEED)

    def troubles(self) -> list[tuple[str, str]]:
        """(image, why) of what happened since the last call and needs the image to be begun anew."""
        found = []
        for alert in self._session.pop_alerts():
            if type(alert).__name__ in TROUBLE:
                image = next((x for x, h in self._handles.items() if h == alert.handle), None)
                if image is not None:
                    found.append((image, alert.message()))
        return found


def _limit(rate: int | None) -> int:
    """A rate as libtorrent has it."""
    return -1 if rate is None else min(rate, MOST_RATE)
