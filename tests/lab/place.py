# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The machines of the lab together: a file server `s`, hosts `h1` and `h2`, and a wire from each host to the server.

They are booted and set up once, and saved; each case begins from there, a few seconds later, with nothing of the last
one in it.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.console import Console
from lab.hosts import CONFIGURATION, LEASE_SECONDS, Host, Server
from lab.machine import BOOT_SECONDS, Machine, Parts
from lab.models import HOSTS, MODELS, WIRES, Model
from lab.outcome import Failure
from lab.setup import set_up_host, set_up_server
from lab.steps import Builder, Step, digest
from lab.wire import Wire

HERE = Path(__file__).resolve().parent
SETUP = (HERE / "machine.py", HERE / "models.py", HERE / "setup.py")
"""What the saved state follows from, beside the images."""


LOOK = """\
for d in /run/forebay/disks/*.sock; do echo "$d"; done; ls -laR /srv/store/images /mnt/nfs/images 2>/dev/null
ps -eo pid,user,stat,wchan:24,args | grep -v ' \\[' ; grep -H . /proc/[0-9]*/stack 2>/dev/null | grep -E 'nfs|rpc'
journalctl -b --no-pager -o short-monotonic | tail -n 400
"""
"""What a failure leaves to be read of each machine."""


class Lab:
    """Running machines: what a case works with."""

    def __init__(
        self, machines: Sequence[Machine], wires: Sequence[Wire], results: Path = Path("results")
    ) -> None:
        self.results = results
        """A directory for what a case is to leave."""
        self.machines = {machine.name: machine for machine in machines}
        self.wires = {wire.ends[1]: wire for wire in wires}
        """By the name of the host."""
        self.server = Server(self.machines["s"])
        self.hosts = [Host(self.machines[model.name]) for model in HOSTS]

    @property
    def host(self) -> Host:
        """The first host."""
        return self.hosts[0]

    @property
    def other(self) -> Host:
        """The second host."""
        return self.hosts[1]

    def keep_logs(self, into: Path) -> None:
        """Keep what LOOK shows of each machine; nothing of one that hangs, or is gone."""
        into.mkdir(parents=True, exist_ok=True)
        for machine in self.machines.values():
            try:
                answer = machine.console and machine.console.run(LOOK, 30.0)
                text = answer.output if answer else ""
            except Failure as failure:
                text = f"{failure}\n"
            (into / f"{machine.name}.log").write_text(text)


@contextlib.contextmanager
def switched_on(parts: Parts, work: Path, saved: Path | None) -> Iterator[Lab]:
    """The lab, from `saved` or from its power switches; off again at the end, whatever happened."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    wires = [Wire(work, ends) for ends in WIRES]
    machines = [
        Machine(model, frozen(parts, saved, model), work / model.name, wires) for model in MODELS
    ]
    try:
        for wire in wires:
            wire.start()
        for machine in machines:
            machine.start(saved and saved / f"{machine.name}.state")
        if saved is not None:
            for machine in machines:
                machine.wait_restored()
            for machine in machines:
                machine.go_on()
        together(lambda machine: _console(machine).wait_awake(BOOT_SECONDS), machines)
        yield Lab(machines, wires, work.parent / "results")
    finally:
        for machine in machines:
            machine.end()
        for wire in wires:
            wire.close()


def frozen(parts: Parts, saved: Path | None, model: Model) -> Parts:
    """What a machine starts from: where its state was saved, its disks as they were then."""
    if saved is None:
        return parts
    disks = tuple(saved / model.name / f"disk{n}.qcow2" for n in range(len(parts.disks)))
    return Parts(parts.kernel, parts.initramfs, disks)


def _console(machine: Machine) -> Console:
    assert machine.console is not None
    return machine.console


def together(action: Callable[[Machine], object], machines: Sequence[Machine]) -> None:
    """Do something at all machines at the same time."""
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(action, machines))


def ready(parts: Parts, builder: Builder) -> Path:
    """The lab's saved state, made unless it is there: machines up, the store mounted, the gateways running."""

    def make(into: Path) -> None:
        with switched_on(parts, into, None) as lab:
            set_up_server(lab.server)
            together(
                lambda machine: set_up_host(Host(machine)), [host.machine for host in lab.hosts]
            )
            for machine in lab.machines.values():
                machine.stand_still()
            for machine in lab.machines.values():
                machine.save(into / f"{machine.name}.state")

    return builder.run(Step("ready", f"{CONFIGURATION} {LEASE_SECONDS} {digest(SETUP)}", make))
