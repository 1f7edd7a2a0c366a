# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An OpenNebula front-end's tree with the drivers installed, whose hosts are this machine, by an ssh that runs here.

What is OpenNebula's own is a stand-in that notes how it was called. The drivers are what `install.sh` installs, and are
called as OpenNebula's driver processes call them.
"""

import base64
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from real.gateway_process import GatewayProcess
from real.libvirt_host import EMULATOR

ADDON = Path(__file__).resolve().parents[2] / "config" / "opennebula"

HASH = "0123456789abcdef0123456789abcdef"
"""The name of an image's file, as OpenNebula makes them."""

RAW = HASH[::-1]
"""That of a raw one."""

STOCK = (
    *(f"tm/qcow2/{x}" for x in ("clone", "clone.ssh", "cpds", "cpds.ssh")),
    *(f"tm/qcow2/snap_{x}{y}" for x in ("create", "create_live", "delete", "revert") for y in ("", ".ssh")),
    *(f"tm/shared/{x}" for x in ("ln", "mv")),
    "tm/ssh/mv",
    *(f"tm/common/{x}" for x in ("delete", "resize", "premigrate", "postmigrate", "failmigrate")),
)  # fmt: skip

NOTES_CALL = '#!/bin/sh\nprintf "%s\\n" "${0##*/remotes/}" "$@" >>{calls}\n'

SSH = """\
#!/bin/sh
printf '%s\\n' "$*" >>{calls}.ssh
host=$1; shift
if [ -e {directory}/off ]; then echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255; fi
PATH={bin}:$PATH exec sh -c "$*"
"""

DEPLOY = """\
#!/bin/bash
mkdir -p "$(dirname "$1")"; cat >"$1"
virsh --connect qemu:///system create "$1" >&2 || {{ echo "Could not create domain from $1" >&2; exit 255; }}
echo 11111111-2222-3333-4444-555555555555
"""

VIRSH = """\
#!/bin/sh
printf '%s\\n' "$*" >>{directory}/virsh
[ ! -e {directory}/virsh-fails ] || {{ echo "error: planted" >&2; exit 1; }}
case $3 in
attach-device) cat "$5" >{directory}/plugged ;;
create)
    told=$({hook} one-7 prepare begin - <"$4" 2>&1) && exit
    echo "error: Failed to create domain from $4"
    echo "error: Hook script execution failed: internal error: Child process (hook) unexpected exit status 1: $told"
    exit 1 ;;
destroy) {hook} one-7 release end - <"$4" ;;
esac
"""
"""Calls Forebay's hook as libvirt would."""

HOOK = ADDON.parent / "libvirt" / "hooks" / "qemu.d" / "forebay"


def element(name: str, content: Mapping[str, str]) -> str:
    inner = "".join(f"<{key}><![CDATA[{value}]]></{key}>" for key, value in content.items())
    return f"<{name}>{inner}</{name}>"


class One:
    """`one.run("tm/forebay/clone", …)` calls a driver as OpenNebula would."""

    def __init__(self, directory: Path, gateway: GatewayProcess, *, version: str = "7.0.1") -> None:
        self.directory = directory
        self.gateway = gateway
        self.location = directory / "one"
        self.remotes = self.location / "var" / "remotes"
        self.on_host = directory / "on host"
        self.bin = directory / "bin"
        self.calls = directory / "calls"
        self.datastores = gateway.directory / "datastores"
        for folder in (self.bin, self.on_host / "vmm" / "kvm", self.remotes, self.location / "bin"):
            folder.mkdir(parents=True)
        (self.datastores / "0").mkdir(parents=True, exist_ok=True)
        (self.datastores / "100").mkdir(exist_ok=True)
        self.remotes.joinpath("VERSION").write_text(f"{version}\n")
        for name in STOCK:
            self.script(self.remotes / name, NOTES_CALL)
        (self.remotes.parent / "config").write_text(f"SCRIPTS_REMOTE_DIR={self.on_host}\n")
        self.script(self.bin / "ssh", SSH)
        self.script(self.bin / "virsh", VIRSH)
        self.script(self.on_host / "vmm/kvm/deploy", DEPLOY)
        self.script(self.on_host / "vmm/kvm/attach_disk", NOTES_CALL)
        self.script(self.bin / "onevm", "#!/bin/sh\ncat {directory}/$1-$2-$3.xml\n")
        self.script(
            self.bin / "forebay",
            f'#!/bin/sh\nFOREBAY_CONFIG={gateway.config} exec {sys.executable} -m forebay "$@"\n',
        )
        self.installed = self.install()
        assert self.installed.returncode == 0, self.installed.stderr
        self.configure(run=str(gateway.run))

    def script(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        places = {"calls": self.calls, "directory": self.directory, "bin": self.bin, "hook": HOOK}
        for key, value in places.items():
            text = text.replace(f"{{{key}}}", str(value))
        path.write_text(text.replace("{{", "{").replace("}}", "}"))
        path.chmod(0o755)

    def configure(self, **settings: str) -> None:
        """Write driver.conf."""
        conf = self.remotes / "tm" / "forebay" / "driver.conf"
        conf.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ONE_LOCATION": str(self.location),
            "ONE_USER": "root",
            "ONE_GROUP": "root",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }

    def install(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ADDON / "install.sh", *words],
            capture_output=True, text=True, check=False, env={**self.environment, **environment},
        )  # fmt: skip

    # -- the VM

    def vm(self, *disks: Mapping[str, str], number: int = 7, beside: Path | None = None) -> bytes:
        """What `onevm show -x` says of a VM with these disks, from now on."""
        body = "".join(element("DISK", {"DISK_ID": str(i), **one}) for i, one in enumerate(disks))
        text = (
            f"<VM><ID>{number}</ID><NAME>{escape('a <b> & c')}</NAME>"
            f"<TEMPLATE><CPU><![CDATA[1]]></CPU>{body}</TEMPLATE>"
            "<USER_TEMPLATE><NOTE><![CDATA[<!DOCTYPE x>]]></NOTE></USER_TEMPLATE></VM>"
        ).encode()
        (self.directory / f"show--x-{number}.xml").write_bytes(text)
        return text

    def disk(self, name: str = HASH, **given: str) -> dict[str, str]:
        """A DISK of an image in datastore 100."""
        return {
            "TM_MAD": "forebay", "DATASTORE_ID": "100", "TYPE": "FILE", "CLONE": "YES", "FORMAT": "qcow2",
            "SOURCE": f"/var/lib/one//datastores/100/{name}", "SIZE": "4", "ORIGINAL_SIZE": "4", **given,
        }  # fmt: skip

    def persistent(self, name: str = HASH, **given: str) -> dict[str, str]:
        return self.disk(name, **{"CLONE": "NO", "FORMAT": "raw", **given})

    @property
    def sysdir(self) -> Path:
        """The directory of VM 7 on the host."""
        return self.datastores / "0" / "7"

    def at(self, disk: int = 0) -> str:
        """HOST:SYSDIR/disk.I, as oned writes it."""
        return f"ham0:{self.datastores}//0/7/disk.{disk}"

    # -- the drivers

    def run(self, script: str, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.remotes / script, *words],
            input=stdin, capture_output=True, check=False, timeout=90, env=self.environment,
        )  # fmt: skip
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def clone(self, name: str = HASH, *, system: str = "") -> subprocess.CompletedProcess[str]:
        source = f"front:/var/lib/one//datastores/100/{name}"
        return self.run(f"tm/forebay/clone{system}", source, self.at(), "7", "100")

    def mvds(self, name: str = HASH) -> subprocess.CompletedProcess[str]:
        source = f"/var/lib/one//datastores/100/{name}"
        return self.run("tm/forebay/mvds", self.at(), source, "7", "100")

    def deploy(
        self, domain: bytes, vm: bytes, ds: bytes = b"<DATASTORE/>"
    ) -> subprocess.CompletedProcess[str]:
        """As the action `deploy=deploy.forebay`: vm.xml and ds.xml in base64 beside the file, stdin likewise."""
        vms = self.location / "var" / "vms" / "7"
        vms.mkdir(parents=True, exist_ok=True)
        file = vms / "deployment.0"
        file.write_bytes(domain)
        for name, content in (("vm.xml", vm), ("ds.xml", ds)):
            (vms / name).write_bytes(base64.b64encode(content))
        words = (str(file), "ham0", "7", "ham0")
        return self.run("vmm/kvm/deploy.forebay", *words, stdin=base64.b64encode(domain))

    def start(self, **given: str) -> subprocess.CompletedProcess[str]:
        """Deploy VM 7 with one persistent disk, of the raw image."""
        vm = self.vm(self.persistent(RAW, **given))
        return self.deploy(self.domain(self.disk_element()), vm)

    def end(self) -> None:
        """What libvirt does when VM 7 ends."""
        file = str(self.sysdir / "deployment.0")
        virsh = [str(self.bin / "virsh"), "--connect", "x", "destroy", file]
        subprocess.run(virsh, check=True, env=self.environment)

    def attach_disk(self, *disks: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        vm = self.vm(*disks)
        message = b"<VMM_DRIVER_ACTION_DATA>" + vm + b"</VMM_DRIVER_ACTION_DATA>"
        words = ("one-7", f"{self.datastores}//0/7/disk.0", "vdb", "1")
        encoded = base64.b64encode(message).decode()
        return self.run("vmm/kvm/attach_disk.forebay", *words, encoded, "7", "ham0")

    def called(self) -> Sequence[str]:
        """How OpenNebula's own scripts were called: each word a line."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def domain(self, devices: str, *, emulator: Path = EMULATOR) -> bytes:
        """A domain as oned writes it, with these elements among its devices."""
        return f"""<?xml version='1.0'?>
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
	<name>one-7</name>
	<uuid>11111111-2222-3333-4444-555555555555</uuid>
	<title>a &lt;b&gt; &amp; c</title>
	<memory unit='KiB'>131072</memory>
	<vcpu>1</vcpu>
	<os>
		<type arch='x86_64' machine='pc'>hvm</type>
	</os>
	<devices>
		<emulator><![CDATA[{emulator}]]></emulator>
{devices}	</devices>
	<qemu:commandline>
		<qemu:env name='FOREBAY' value='1'/>
	</qemu:commandline>
	<metadata>
		<one:vm xmlns:one="http://opennebula.org/xmlns/libvirt/1.0">
			<one:system_datastore><![CDATA[{self.datastores}//0/7]]></one:system_datastore>
			<one:name><![CDATA[a <b> & c]]></one:name>
		</one:vm>
	</metadata>
</domain>
""".encode()

    def disk_element(
        self, number: int = 0, *, driver: str = "cache='unsafe' io='native' discard='unmap'"
    ) -> str:
        return (
            "\t\t<disk type='file' device='disk'>\n"
            f"\t\t\t<source file='{self.datastores}//0/7/disk.{number}'/>\n"
            f"\t\t\t<target dev='vd{'abcdefgh'[number]}'/>\n"
            f"\t\t\t<driver name='qemu' type='raw' {driver}/>\n"
            "\t\t</disk>\n"
        )


def one_of(
    make_gateway: Callable[..., GatewayProcess],
    directory: Path,
    *,
    shares: One | None = None,
    group: str = "root",
) -> One:
    """The tree, and a daemon that serves datastore 100: its own, or that of another host."""
    gateway = make_gateway(start=False)
    if shares is not None:
        (gateway.directory / "datastores").symlink_to(shares.datastores)
    store = gateway.directory / "datastores" / "100"
    store.mkdir(parents=True, exist_ok=True)
    settings = {"path": str(store), "socket": True, "mode": "write-back"}
    gateway.configure({"stores.one-100": settings, "gateway": {"socket_group": group}})
    gateway.start()
    return One(directory, gateway)
