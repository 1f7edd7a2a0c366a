# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The sub-commands: what each takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from forebay.cli.peer import add_change, add_rule
from forebay.cli.terminal.parser import Parser, checked, imported
from forebay.units import (
    Mode,
    parse_bps,
    parse_duration,
    parse_format,
    parse_name,
    parse_preload,
    parse_requests,
    parse_size,
    parse_weight,
)

TYPE_CHECKING = False  # `typing` takes 3 ms, on each start of the command
if TYPE_CHECKING:
    from typing import Any


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write STORE:PATH, a path in a store, or an nbd:// URI")
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise ValueError(f"{text!r} has bytes that are no UTF-8: no image has such a name")
    return text


def _patience(text: str) -> float:
    from forebay.cli.terminal.wait import parse_patience

    return parse_patience(text)


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write a path")
    return os.path.abspath(text)


NAME, SIZE, MODE = checked(parse_name), checked(parse_size), checked(Mode.parse)
PRELOAD, DURATION, IMAGE = checked(parse_preload), checked(parse_duration), checked(_some_text)
PATH = checked(_path)


def _name(parser: Parser, **extra: Any) -> None:
    parser.add_argument("name", metavar="NAME", type=NAME, help="the disk", **extra)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def _nothing(parser: Parser) -> None:
    """For a sub-command without arguments of its own."""


def _serve(parser: Parser) -> None:
    parser.add_argument("--state", metavar="DIR", help="instead of gateway.state")
    parser.add_argument("--run", metavar="DIR", help="instead of gateway.run")


def _attach(parser: Parser) -> None:
    _name(parser)
    add = parser.add_argument
    text = "STORE:PATH, a path in a store, an NBD URI, or scratch:SIZE"
    add("image", metavar="IMAGE", type=IMAGE, help=text)
    add("--mode", metavar="MODE", type=MODE, help=", ".join(Mode))
    add(
        "--cache-size", metavar="SIZE", type=SIZE, help="most it may hold of the cache; 0: no limit"
    )
    add("--preload", metavar="SIZE|trace|all", type=PRELOAD, help="what to bring in at once")
    _rates(parser)
    add("--read-only", action="store_true", help="refuse writes")
    add("--overlay", action="store_true", help="keep writes private and drop them at detach")
    text = "raw: serve the bytes of the image; qcow2, vmdk, vdi or vhdx: the disk in it"
    add("--format", metavar="FORMAT", type=checked(parse_format), help=text)
    add("--keep", action="store_true", help="with --overlay: keep them beyond detach")
    add_rule(parser)
    text = "for a VM that is about to come: another host writes the image, and hands it over"
    add("--incoming", action="store_true", help=text)
    text = "with --overlay --incoming: it comes with what it has"
    add("--with-data", action="store_true", help=text)
    text = "while another host has the image, wait until it is free, or for as long as this says"
    add("--wait", metavar="TIME", type=checked(_patience), nargs="?", const=float("inf"), help=text)
    _json(parser)


def _rates(parser: Parser) -> None:
    add, requests = parser.add_argument, checked(parse_requests)
    text = "requests a second that its clients may make; 0: no limit"
    add("--iops", metavar="N", type=requests, help=text)
    text = "bytes a second that they may read and write; 0: no limit"
    add("--bps", metavar="SIZE", type=checked(parse_bps), help=text)
    text = "requests that may pass at once after a rest; 0: a tenth of --iops"
    add("--iops-burst", metavar="N", type=requests, help=text)
    text = "bytes, likewise; 0: a tenth of --bps"
    add("--bps-burst", metavar="SIZE", type=SIZE, help=text)
    text = "what it gets beside others where requests wait: 1 to 10000; default: 100"
    add("--weight", metavar="N", type=checked(parse_weight), help=text)


def _detach(parser: Parser) -> None:
    _name(parser)
    add = parser.add_argument
    add("--discard", action="store_true", help="drop what is dirty instead of writing it back")
    add("--force", action="store_true", help="even while a client is connected to it")


def _status_of(parser: Parser) -> None:
    _name(parser)
    _json(parser)


def _status(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", metavar="NAME", type=NAME, nargs="?", help="the disk; default: all")
    text = "what a larger cache, or a smaller one, would find of what is read"
    which.add_argument("--advice", action="store_true", help=text)
    text = "only disks that need a look, with what is wrong; exit code 1 if there are any"
    parser.add_argument("-x", "--troubled", action="store_true", help=text)
    _json(parser)


def _stats(parser: Parser) -> None:
    text = "a disk; seconds between lines; how many lines"
    parser.add_argument("what", metavar="NAME | INTERVAL | COUNT", nargs="*", help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-l", "--latency", action="store_true", help="how long requests took")
    which.add_argument("-w", "--histogram", action="store_true", help="the same as a histogram")
    parser.usage = "forebay stats [--config FILE] [--json] [-l | -w] [NAME] [INTERVAL [COUNT]]"
    _json(parser)


def _flush(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", metavar="NAME", type=NAME, nargs="?", help="the disk; default: all")
    which.add_argument("--all", action="store_true", help="all disks")
    parser.add_argument("--timeout", metavar="TIME", type=DURATION, help="give up after 30s, 2m")
    _json(parser)


def _peer(parser: Parser) -> None:
    _name(parser)
    add_change(parser)


def _mode(parser: Parser) -> None:
    _name(parser)
    parser.add_argument("mode", metavar="MODE", type=MODE, help=", ".join(Mode))


def _preload(parser: Parser) -> None:
    _name(parser)
    text = "so much from the start of the image, what boots read, or all of it"
    parser.add_argument("amount", metavar="SIZE|trace|all", type=PRELOAD, help=text)


def _images(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.images", fromlist=[add])
    getattr(module, add)(parser, checked, IMAGE)


def _import(parser: Parser) -> None:
    __import__("forebay.cli.importing", fromlist=["add_all"]).add_all(parser, checked, IMAGE)


def _hosts(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.hosts.arguments", fromlist=[add])
    getattr(module, add)(parser, checked, IMAGE)


def _doctor(parser: Parser) -> None:
    text = "write a tar for a bug report, without secrets, to this new file"
    parser.add_argument("--bundle", metavar="FILE", type=PATH, help=text)
    _json(parser)


def _overlays(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.overlays", fromlist=[add])
    getattr(module, add)(parser, NAME, IMAGE)


def _resolve(parser: Parser) -> None:
    __import__("forebay.cli.resolve", fromlist=["add_all"]).add_all(parser, NAME, IMAGE)


def _moving(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.moving", fromlist=[add])
    getattr(module, add)(parser, NAME, DURATION, IMAGE)


def _xml(parser: Parser) -> None:
    _name(parser)
    target = imported("forebay.libvirt.disk_xml", "parse_target")
    parser.add_argument("--target", metavar="DEV", type=target, default="vda", help="default: vda")
    text = "for this version of libvirt (default: the one on this host)"
    parser.add_argument(
        "--libvirt",
        metavar="VERSION",
        type=imported("forebay.libvirt.version", "parse_version"),
        help=text,
    )
    text = "the <metadata> element from which libvirt's hook attaches it"
    parser.add_argument("--metadata", action="store_true", help=text)


def _settings(parser: Parser, add: str, of: str = "disks") -> None:
    module = __import__(f"forebay.cli.settings.{of}", fromlist=[add])
    getattr(module, add)(parser)


def _libvirt_hook(parser: Parser) -> None:
    for name in ("domain", "operation", "sub_operation"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("extra", metavar="EXTRA", nargs="?", default="-")


def _cache(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "action",
        metavar="ACTION",
        choices=("check", "info", "create", "extend", "format", "remove", "repair", "scrub"),
        nargs="?",
        default="info",
        help="info, create, extend, format, remove, scrub (beside guests), check (without a daemon) or repair",
    )
    add(
        "--vg",
        metavar="VG",
        type=imported("forebay.storage.lvm", "parse_group"),
        help="create: a logical volume, in this group",
    )
    add(
        "--tag",
        metavar="@TAG",
        type=imported("forebay.storage.lvm", "parse_tag"),
        help="create: on disks with this tag of LVM",
    )
    add("--device", metavar="PATH", type=PATH, help="create: on this block device")
    add("--file", metavar="PATH", type=PATH, help="create: in this file, which is not there yet")
    add("--size", metavar="SIZE", type=SIZE, help="create, extend: how large it is to be")
    text = "create, format: a device that holds something unknown"
    add("--force", action="store_true", help=text)
    text = "repair: drop dirty data that is damaged, too"
    add("--yes", action="store_true", help=text)
    _json(parser)


def _beside(parser: Parser, sure: str) -> None:
    parser.add_argument("image", metavar="IMAGE", type=IMAGE, help="STORE:PATH, or any path")
    parser.add_argument("--yes", action="store_true", help=sure)
    _json(parser)


_ANYWAY = "finish a checkpoint although the image was changed since it began, or is a copy"
_GIVE_UP = "give up what the other gateway has and the image lacks"


def _fuse(parser: Parser) -> None:
    add = parser.add_argument
    add("mount", metavar="MOUNT", help="the directory to mount at")
    add("--allow-other", action="store_true", help="let other users in, as far as modes allow")
    text = "how long a request waits for a daemon that is away, then fails (default: 10s)"
    add("--wait", metavar="TIME", type=DURATION, default=10.0, help=text)
    text = "how long a daemon may answer nothing until it counts as away (default: 2m)"
    add("--patience", metavar="TIME", type=DURATION, default=120.0, help=text)


def _stager(parser: Parser) -> None:
    parser.add_argument("mount", metavar="MOUNT", help="where 'forebay fuse' is mounted")


def _stage(parser: Parser) -> None:
    __import__("forebay.cli.staging.arguments", fromlist=["add"]).add(parser, checked, IMAGE)


def _events(parser: Parser) -> None:
    __import__("forebay.cli.events.arguments", fromlist=["add"]).add(parser, checked, NAME)


def _watching(parser: Parser, add: str) -> None:
    module = __import__("forebay.cli.watching.arguments", fromlist=[add])
    getattr(module, add)(parser, checked)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "serve": ("run the daemon in the foreground", _serve),
    "attach": ("serve an image as a disk", _attach),
    "detach": ("write back what is dirty and stop serving a disk", _detach),
    "status": ("what is served, and how it is", _status),
    "summary": ("how this host stands, in one answer", partial(_hosts, add="add_summary")),
    "hosts": ("how many hosts stand, asked by ssh", partial(_hosts, add="add_hosts")),
    "stats": ("rates, one line an interval", _stats),
    "events": ("what has happened, and who asked for it", _events),
    "top": ("what goes on, on the whole terminal", partial(_watching, add="add_top")),
    "page": ("what goes on, as a page for browsers", partial(_watching, add="add_page")),
    "flush": ("write back until nothing is dirty", _flush),
    "get": (
        "the settings of disks, and where each is said",
        partial(_settings, add="add_get"),
    ),
    "set": ("change settings of a disk while its VM runs", partial(_settings, add="add_set")),
    "mode": ("change how a disk reads and writes", _mode),
    "peer": ("say which processes may use a disk", _peer),
    "preload": ("bring part of an image into the cache", _preload),
    "images": ("what the cache has of which image", partial(_images, add="add_list")),
    "stores": (
        "the sockets of stores, and who reads images by them",
        partial(_images, add="add_list"),
    ),
    "warm": ("bring an image in without a disk", partial(_images, add="add_warm")),
    "tag": ("give an image tags", partial(_images, add="add_tag")),
    "untag": ("take tags away", partial(_images, add="add_tag")),
    "pin": ("keep an image in the cache", partial(_images, add="add_pin")),
    "unpin": ("let it leave the cache again", partial(_images, add="add_pin")),
    "trace": ("what boots from an image read", partial(_images, add="add_trace")),
    "purge": (
        "drop what the cache has of images",
        partial(_images, add="add_purge"),
    ),
    "import": ("make a raw image in a store of a file, here or on the web", _import),
    "overlays": ("the overlays, attached or kept", partial(_overlays, add="add_list")),
    "save": ("make a new image of what a disk shows", partial(_overlays, add="add_save")),
    "commit": (
        "write the changes of an overlay to its image",
        partial(_overlays, add="add_commit"),
    ),
    "revert": ("give up the changes of an overlay", partial(_overlays, add="add_revert")),
    "snapshot": (
        "give what an overlay shows now a name",
        partial(_overlays, add="add_snapshot"),
    ),
    "snapshots": ("the snapshots of an overlay", _status_of),
    "rollback": (
        "have an overlay show what it did at a snapshot",
        partial(_overlays, add="add_rollback"),
    ),
    "drop": ("forget a snapshot", partial(_overlays, add="add_snapshot")),
    "resolve": ("go on after somebody else changed an image, with its data kept", _resolve),
    "handover": (
        "hand the image of a running VM over to another host",
        partial(_moving, add="add_handover"),
    ),
    "evacuate": (
        "write everything back, and give back what nobody uses: before maintenance of this host",
        partial(_moving, add="add_evacuate"),
    ),
    "xml": ("the libvirt <disk> element of a disk", _xml),
    "libvirt-hook": ("what libvirt's hook calls, with the domain's XML on stdin", _libvirt_hook),
    "cache": ("look at, make, extend, check or remove the cache device", _cache),
    "recover": (
        "finish what a gateway that is gone had begun with an image",
        partial(_beside, sure=_ANYWAY),
    ),
    "takeover": (
        "take an image from a gateway that is gone for good",
        partial(_beside, sure=_GIVE_UP),
    ),
    "fuse": ("mount disks and images as files, in the foreground", _fuse),
    "doctor": ("what is wrong with this host and its daemon, and what to do", _doctor),
    "stage": ("have an image in the caches of many hosts", _stage),
    "stager": ("exchange what is staged with other hosts, in the foreground", _stager),
    "check-config": ("say what is wrong with the configuration", _nothing),
    "dump-config": (
        "print the effective configuration",
        partial(_settings, add="add_dump", of="daemon"),
    ),
    "reload": (
        "have the daemon take stores and settings from the configuration anew",
        partial(_settings, add="add_reload", of="daemon"),
    ),
    "demo": ("show everything on a throw-away directory", _nothing),
}
"""By name: what it does, and what adds its arguments to its parser."""
