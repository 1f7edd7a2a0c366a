# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which machines the lab has, and which wires: a file server, two hosts, a wire from each host to the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What a machine is made of."""

    name: str
    number: int
    """Of its own in the lab: addresses and the machine's id follow from it."""

    memory: int
    """MiB."""

    wires: tuple[str, ...]
    """Names of the wires that it is at, in the order of its interfaces."""


SERVER = Model("s", 1, 512, ("s-h1", "s-h2"))
HOSTS = (Model("h1", 2, 800, ("s-h1",)), Model("h2", 3, 800, ("s-h2",)))
MODELS = (SERVER, *HOSTS)
WIRES = (("s", "h1"), ("s", "h2"))
"""The machines at each wire; its name is theirs."""


def hardware_address(model: Model, interface: int) -> str:
    """Of one of a machine's interfaces."""
    return f"52:54:00:0f:{model.number:02x}:{interface:02x}"


def address(model: Model, wire: str) -> str:
    """10.9.N.M: a network for each wire, and in it each machine's number."""
    network = ["-".join(ends) for ends in WIRES].index(wire) + 1
    return f"10.9.{network}.{model.number}"
