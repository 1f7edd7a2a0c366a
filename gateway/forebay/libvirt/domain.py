# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a domain's XML says of its Forebay disks.

    <metadata>
      <disks xmlns='urn:forebay:libvirt:1'>
        <disk name='vm1' image='images:debian-12.raw' mode='write-back'/>
      </disks>
    </metadata>

The attributes are the arguments of `forebay attach`: name, image, mode, cache-size, preload, iops, bps, iops-burst,
bps-burst, weight, read-only, overlay, with-data, peer; and instance, for a disk of `forebay@INSTANCE` instead of
`forebay`.
libvirt keeps one element for each namespace (formatdomain.rst, "General metadata"), hence the one around them.
"""

import pwd
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forebay.errors import ForebayError
from forebay.units import (
    Mode,
    did_you_mean,
    parse_bps,
    parse_name,
    parse_preload,
    parse_requests,
    parse_size,
    parse_weight,
)

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

PEER_RULES = ("first", "label", "any")
"""As `forebay.config.fields` has them, which takes longer to import."""

LABELS = ("selinux", "apparmor")
"""Models of security whose labels the kernel tells of a connection."""

NAMESPACE = "urn:forebay:libvirt:1"
"""Of our elements. It never changes: domains have it in their XML."""


@dataclass(frozen=True)
class WantedDisk:
    """One disk of a domain, as `forebay attach` takes it; None stands for what the store says."""

    name: str
    image: str
    mode: Mode | None = None
    cache_size: int | None = None
    preload: int | str | None = None
    iops: int | None = None
    bps: int | None = None
    iops_burst: int | None = None
    bps_burst: int | None = None
    weight: int | None = None
    read_only: bool = False
    overlay: bool = False
    with_data: bool = False
    peer: str | None = None
    instance: str | None = None


@dataclass(frozen=True)
class Domain:
    """A domain's name, its UUID, and the Forebay disks that its metadata names.

    `label` and `user` (a uid) are those of its processes; None where libvirt has not said.
    """

    name: str
    uuid: str
    disks: tuple[WantedDisk, ...]
    label: str | None = None
    user: int | None = None


def _yes_or_no(text: str) -> bool:
    known = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if text.lower() not in known:
        raise ValueError(f"{text!r} is neither yes nor no")
    return known[text.lower()]


def _image(text: str) -> str:
    if text.startswith("/") or ":" in text:
        return text
    raise ValueError(f"{text!r} is no image: write STORE:PATH, an absolute path or an NBD URI")


def _peer(text: str) -> str:
    if text in PEER_RULES:
        return text
    raise ValueError(f"{text!r} is unknown: use {', '.join(PEER_RULES)}")


ATTRIBUTES: dict[str, Callable[[str], Any]] = {
    "name": parse_name,
    "image": _image,
    "mode": Mode.parse,
    "cache-size": parse_size,
    "preload": parse_preload,
    "iops": parse_requests,
    "bps": parse_bps,
    "iops-burst": parse_requests,
    "bps-burst": parse_size,
    "weight": parse_weight,
    "read-only": _yes_or_no,
    "overlay": _yes_or_no,
    "with-data": _yes_or_no,
    "peer": _peer,
    "instance": parse_name,
}
"""Of <disk>, with what checks each; the checks raise ValueError."""


def read_domain(xml: str) -> Domain:
    """The domain that libvirt has written as XML. Raises ForebayError for what is wrong in our part of it."""
    # libvirt writes this text itself: no entities, nothing external
    from xml.etree import ElementTree as ET  # noqa: PLC0415  (8 ms, and most commands do without)

    try:
        root = ET.fromstring(xml)  # noqa: S314
    except ET.ParseError as fault:
        raise ForebayError(f"the domain's XML cannot be read: {fault}") from None
    elements = root.iterfind(f"metadata/{{{NAMESPACE}}}disks/{{{NAMESPACE}}}disk")
    disks = tuple(_wanted(dict(element.attrib)) for element in elements)
    names = [disk.name for disk in disks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ForebayError(f"metadata: <disk name='{min(twice)}'> stands there twice: remove one")
    label = next((found for model in LABELS if (found := _seclabel(root, model))), None)
    user = _uid(_seclabel(root, "dac").partition(":")[0])
    return Domain(root.findtext("name", ""), root.findtext("uuid", ""), disks, label, user)


def _seclabel(root: "Element", model: str) -> str:
    """The label that the domain's processes have by that model, which libvirt knows when it starts them; else empty."""
    return (root.findtext(f"seclabel[@model='{model}']/label") or "").strip()


def _uid(owner: str) -> int | None:
    """The number of the user that libvirt writes as `+64055`, `64055` or `qemu`; None where it is no user."""
    number = owner.removeprefix("+")
    if number.isascii() and number.isdecimal() and len(number) <= len("4294967294"):
        return int(number)
    try:
        return pwd.getpwnam(owner).pw_uid if owner else None
    except (KeyError, ValueError):
        return None


def _wanted(attributes: dict[str, str]) -> WantedDisk:
    """The disk of one <disk> element. Raises ForebayError."""
    where = f"metadata: <disk name='{attributes.get('name', '')}'>"
    values = {}
    for key, text in attributes.items():
        if key not in ATTRIBUTES:
            hint = did_you_mean(key, ATTRIBUTES)
            known = ", ".join(ATTRIBUTES)
            raise ForebayError(f"{where}: no attribute '{key}'{hint}: use {known}")
        try:
            values[key.replace("-", "_")] = ATTRIBUTES[key](text)
        except ValueError as fault:
            raise ForebayError(f"{where}: {key}: {fault}") from None
    for key in ("name", "image"):
        if key not in values:
            raise ForebayError(f"{where}: '{key}' is missing")
    if values.get("with_data") and not values.get("overlay"):
        raise ForebayError(f"{where}: with-data is for an overlay: leave it out")
    if values.get("read_only") and values.get("overlay"):
        raise ForebayError(f"{where}: either read-only or overlay: leave one of the two out")
    return WantedDisk(**values)
