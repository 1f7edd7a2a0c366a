# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The nbdkit door as a process on loopback: TLS keys and certificates, rules, and nbdkit with the plugin."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from real.gateway_process import GatewayProcess
from real.processes import START_TIMEOUT, end, need

PLUGIN = Path(__file__).parents[2] / "nbd" / "nbdkit" / "plugin.py"

EVERYTHING = '[[allow]]\nexports = ["*"]\npeers = ["127.0.0.1", "unix"]\n'
"""Rules that give every disk to this host."""

ALICE = "5ec2e7" * 8
"""The pre-shared key of the user alice, hexadecimal."""

EXTENSIONS = {
    "ca": "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n",
    "server": "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
    "extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1,DNS:localhost\n",
    "client": "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
    "extendedKeyUsage=clientAuth\n",
}


def need_nbdkit() -> None:
    """Skip unless nbdkit runs Python plugins, and this Python sees libnbd."""
    need("nbdkit")
    found = subprocess.run(["nbdkit", "python", "--dump-plugin"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("nbdkit has no Python plugin: `make setup` installs nbdkit-plugin-python")
    pytest.importorskip(
        "libnbdmod", reason="python3-libnbd is not installed: `make setup` installs it"
    )


class Authority:
    """A certificate authority in a directory of its own. Needs openssl."""

    def __init__(self, directory: Path, name: str) -> None:
        need("openssl")
        self.directory = directory
        directory.mkdir()
        self.certificate = directory / "ca-cert.pem"
        self._issue("ca", directory, name, ["-key", str(directory / "ca-key.pem")])

    def issue(self, kind: str, directory: Path, name: str) -> Path:
        """A directory as nbdkit, libnbd and qemu want it: `kind` is server or client."""
        directory.mkdir(exist_ok=True)
        shutil.copy(self.certificate, directory / "ca-cert.pem")
        signer = ["-CA", str(self.certificate), "-CAkey", str(self.directory / "ca-key.pem")]
        self._issue(kind, directory, name, signer)
        return directory

    def _issue(self, kind: str, directory: Path, name: str, signer: list[str]) -> None:
        key, request = directory / f"{kind}-key.pem", directory / f"{kind}.csr"
        (directory / f"{kind}.ext").write_text(EXTENSIONS[kind])
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        _openssl("req", "-new", "-key", key, "-subj", f"/O=Forebay/CN={name}", "-out", request)
        _openssl(
            "x509",
            "-req",
            "-in",
            request,
            "-days",
            "2",
            *signer,
            "-extfile",
            directory / f"{kind}.ext",
            "-out",
            directory / f"{kind}-cert.pem",
        )


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class NbdkitDoor:
    """One nbdkit with the plugin on `gateway`. `security` are its TLS options; default: keys, of the user alice."""

    def __init__(
        self,
        gateway: GatewayProcess,
        *parameters: str,
        rules: str = EVERYTHING,
        security: Sequence[str] | None = None,
        filters: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        need_nbdkit()
        self.directory = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
        self.rules = self.directory / "rules.toml"
        self.rules.write_text(rules)
        self.keys = self.directory / "keys.psk"
        self.keys.write_text(f"alice:{ALICE}\n")
        self.log = self.directory / "log"
        self.port = free_port()
        if security is None:
            security = ["--tls=require", f"--tls-psk={self.keys}"]
        command = ["nbdkit", "--foreground", "--exit-with-parent", *security, *options]
        command += ["--ipaddr=127.0.0.1", f"--port={self.port}"]
        command += [f"--filter={name}" for name in filters]
        command += ["python", str(PLUGIN), f"run={gateway.run}", f"rules={self.rules}", *parameters]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            self._wait()
        except BaseException:
            self.remove()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self.process.poll() is None:
            if greets(self.port):  # it listens before it has checked all it checks
                return
            assert time.monotonic() < deadline, self.log_text()
            time.sleep(0.01)
        raise RuntimeError(f"nbdkit ended: exit {self.process.returncode}\n{self.log_text()}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def uri(self, disk: str, **parameters: Any) -> str:
        """What libnbd's tools take: alice's key unless other `parameters` are given (`_` for `-`)."""
        chosen = parameters or {"tls_psk_file": self.keys}
        query = "&".join(f"{key.replace('_', '-')}={value}" for key, value in chosen.items())
        user = "" if "tls_certificates" in chosen else "alice@"
        return f"nbds://{user}127.0.0.1:{self.port}/{disk}?{query}"

    def qemu(self, disk: str, certificates: Path | None = None) -> list[str]:
        """The arguments by which qemu-img and qemu-io open the disk: with alice's key, or a certificate."""
        how = f"dir={certificates}" if certificates else f"dir={self.directory},username=alice"
        kind = "tls-creds-x509" if certificates else "tls-creds-psk"
        where = f"file.server.type=inet,file.server.host=127.0.0.1,file.server.port={self.port}"
        image = f"driver=raw,file.driver=nbd,{where},file.export={disk},file.tls-creds=t"
        return ["--object", f"{kind},id=t,endpoint=client,{how}", "--image-opts", image]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def remove(self) -> None:
        end(self.process)
        shutil.rmtree(self.directory, ignore_errors=True)


def greets(port: int) -> bool:
    """Whether an NBD server on loopback speaks."""
    try:
        with socket.create_connection(("127.0.0.1", port), START_TIMEOUT) as probe:
            return probe.recv(8) == b"NBDMAGIC"
    except OSError:
        return False


def free_port() -> int:
    """A TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
