# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""OpenNebula's drivers, called as OpenNebula calls them, on a real daemon, real qemu-img and stand-ins for its own."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from real.disk_fixture import run
from real.gateway_process import GatewayProcess
from real.one_bed import HASH, RAW, One, one_of
from real.processes import MIB, need, random_image

Make = Callable[..., GatewayProcess]

SIZE = 4 * MIB


@pytest.fixture
def one(make_gateway: Make, tmp_path: Path) -> One:
    need("qemu-img")
    return one_of(make_gateway, tmp_path)


@pytest.fixture
def content(one: One) -> bytes:
    """Of a qcow2 image and a raw one in datastore 100."""
    store = one.datastores / "100"
    found = random_image(store / "raw", SIZE, 1)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", store / "raw", store / HASH)
    (store / "raw").rename(store / RAW)
    return found


def guest(path: Path, form: str, to: Path) -> bytes:
    """What a guest sees of a disk."""
    run("qemu-img", "convert", "-f", form, "-O", "raw", path, to)
    return to.read_bytes()


def log(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it wrote for the VM's log; nothing is on stdout."""
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


def vm_files(one: One) -> list[str]:
    return sorted(str(x.relative_to(one.sysdir)) for x in one.sysdir.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------- clone


def test_a_clone_is_a_delta_on_the_sockets_of_its_store_and_nothing_is_copied(
    one: One, content: bytes, tmp_path: Path
) -> None:
    one.vm(one.disk())
    done = one.clone()
    assert (done.returncode, log(done)) == (
        0,
        f"INFO: clone: {one.sysdir}/disk.0 on ham0 is a clone of {HASH} through Forebay",
    )
    disk = one.sysdir / "disk.0"
    assert vm_files(one) == ["disk.0", "disk.0.snap", "disk.0.snap/0", "disk.0.snap/disk.0.snap"]
    assert (disk.readlink(), (one.sysdir / "disk.0.snap/disk.0.snap").readlink()) == (
        Path("disk.0.snap/0"),
        Path(),
    )
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", disk).stdout)
    uri = f"nbd+unix:///{HASH}?socket={one.gateway.run}/stores/one-100.sock"
    assert (told["backing-filename"], told["backing-filename-format"]) == (uri, "qcow2")
    assert told["virtual-size"] == SIZE
    assert told["actual-size"] < MIB
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", disk)
    expected = content[: 64 << 10] + b"\7" * (64 << 10) + content[128 << 10 :]
    assert guest(disk, "qcow2", tmp_path / "saved") == expected
    assert one.called() == []
    assert json.loads(one.gateway.cli("status", "--json").stdout) == []


def test_how_long_a_clone_takes(one: One, content: bytes) -> None:
    """Shown with -s; the time that ssh takes comes on top."""
    one.vm(one.disk())
    took, bare = [], []
    for _ in range(5):
        began = time.perf_counter()
        assert one.clone().returncode == 0
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run(
            ["/usr/bin/python3", "-c", "import subprocess, xml.etree.ElementTree"],
            check=True,
        )
        bare.append(time.perf_counter() - began)
    print(
        f"\na clone: {min(took) * 1000:.0f} ms at best, of which Python's start {min(bare) * 1000:.0f}"
    )
    assert (one.sysdir / "disk.0.snap" / "0").stat().st_blocks * 512 < MIB


def test_a_clone_is_larger_where_the_template_says_so(
    one: One, content: bytes, tmp_path: Path
) -> None:
    one.vm(one.disk(SIZE="8"))
    assert one.clone().returncode == 0
    assert guest(one.sysdir / "disk.0", "qcow2", tmp_path / "saved") == content + bytes(SIZE)
    one.vm(one.disk(SIZE="2"))
    assert one.clone().returncode == 0
    assert guest(one.sysdir / "disk.0", "qcow2", tmp_path / "saved") == content


@pytest.mark.parametrize(
    ("name", "given", "form"),
    [(RAW, {"FORMAT": "raw"}, "raw"), (HASH, {"QCOW2_STANDALONE": "YES"}, "qcow2")],
)
def test_a_raw_clone_and_a_standalone_one_are_read_through_the_cache(
    one: One, content: bytes, tmp_path: Path, name: str, given: dict[str, str], form: str
) -> None:
    disk = one.sysdir / "disk.0"
    for sparse in ({}, {"SPARSE": "NO"}):
        one.vm(one.disk(name, SIZE="8", **given, **sparse))
        done = one.clone(name)
        assert done.returncode == 0, done.stderr
        told = json.loads(run("qemu-img", "info", "--output=json", disk).stdout)
        assert (told["format"], "backing-filename" in told) == (form, False)
        assert guest(disk, form, tmp_path / "saved") == content + bytes(SIZE)
    assert disk.is_symlink() == (form == "qcow2")


def test_on_a_local_system_datastore_the_host_is_asked_about_disks_by_ssh(
    one: One, content: bytes
) -> None:
    monitor = one.datastores / "0" / ".monitor"
    one.vm(one.disk())
    for system in (".ssh", ".local"):
        assert one.clone(system=system).returncode == 0
        assert monitor.read_text() == "ssh\n"
    assert one.clone().returncode == 0
    assert not monitor.exists()


def test_a_clone_that_is_made_again_begins_anew(one: One, content: bytes, tmp_path: Path) -> None:
    one.vm(one.disk())
    for _ in range(2):
        assert one.clone().returncode == 0
        disk = one.sysdir / "disk.0"
        assert guest(disk, "qcow2", tmp_path / "saved") == content
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", disk)
    (one.sysdir / "disk.0.snap" / "0").unlink()  # as one that was killed in the middle leaves it
    assert one.clone().returncode == 0
    assert guest(one.sysdir / "disk.0", "qcow2", tmp_path / "saved") == content


# -------------------------------------------------------------------------------- the table of failures, row by row


def test_with_the_daemon_down_a_clone_is_made_on_the_mount_with_a_warning(
    one: One, content: bytes
) -> None:
    one.gateway.stop()
    one.vm(one.disk())
    for system, stock in (("", "clone"), (".ssh", "clone.ssh"), (".local", "clone.ssh")):
        one.calls.unlink(missing_ok=True)
        done = one.clone(system=system)
        assert done.returncode == 0
        assert re.fullmatch(
            rf"INFO: clone{system}: WARNING: made on the mount of datastore 100, since Forebay on ham0 "
            r"cannot: .*100\.sock.*",
            log(done),
        )
        source = f"front:/var/lib/one//datastores/100/{HASH}"
        assert one.called() == [f"tm/qcow2/{stock}", source, one.at(), "7", "100"]


def test_without_the_fallback_it_fails_and_leaves_nothing(one: One, content: bytes) -> None:
    one.configure(run=str(one.gateway.run), fallback="no")
    one.vm(one.disk("ffffffffffffffffffffffffffffffff"))
    done = one.clone("ffffffffffffffffffffffffffffffff")
    assert done.returncode == 1
    assert "no such image" in log(done)
    assert log(done).startswith("ERROR: clone: no clone through Forebay on ham0: ")
    assert (vm_files(one), one.called()) == ([], [])
    one.gateway.kill()
    one.vm(one.disk())
    assert "Failed to connect" in log(one.clone())
    assert (vm_files(one), one.called()) == ([], [])
    (one.directory / "off").touch()
    assert "No route to host" in log(one.clone())


def test_with_cache_mode_none_a_clone_passes_forebay_by(one: One, content: bytes) -> None:
    one.vm(one.disk(CACHE_MODE="none"))
    done = one.clone()
    assert (done.returncode, one.called()[0]) == (0, "tm/qcow2/clone")
    assert "WARNING" not in log(done)
    assert vm_files(one) == [] if one.sysdir.exists() else True


def test_a_wrong_driver_conf_is_one_line(one: One) -> None:
    one.vm(one.disk())
    for key, value in (("fallback", "maybe"), ("run", "relative"), ("run", "/a\tb")):
        one.configure(**{key: value})
        done = one.clone()
        assert done.returncode == 1
        assert log(done).startswith(f"ERROR: clone: driver.conf: {key} is ")


# ------------------------------------------------------------------------------------------------------- hostile words

NAMES = [
    "a b", "a'b", 'a"b', "$(touch PWNED)", "`touch PWNED`", "-x", "a;touch PWNED", "a&b|c", "a%41b", "a?b=c#d", "é",
    "*", "~", "a\\b", "--help", "x" * 200, "日本語", "json:{}",
]  # fmt: skip


def test_a_name_of_an_image_is_never_a_command(one: One, content: bytes, tmp_path: Path) -> None:
    one.configure(run=str(one.gateway.run), fallback="no")
    for name in NAMES:
        shutil.copy(one.datastores / "100" / HASH, one.datastores / "100" / name)
        one.vm(one.disk(name))
        done = one.clone(name)
        assert done.returncode == 0, done.stderr
        told = json.loads(
            run("qemu-img", "info", "-U", "--output=json", one.sysdir / "disk.0").stdout
        )
        assert told["virtual-size"] == SIZE
    assert guest(one.sysdir / "disk.0", "qcow2", tmp_path / "saved") == content
    assert not list(Path.cwd().glob("PWNED")) + list(one.directory.rglob("PWNED"))


REFUSED = [
    (0, "front:/var/lib/one/datastores/100/../../etc/passwd"),
    (0, "front:relative"),
    (0, "front:/var/lib/one/datastores/100/a\nb"),
    (1, "-oProxyCommand=touch PWNED:/x/0/7/disk.0"),
    (1, "ham0;touch PWNED:/x/0/7/disk.0"),
    (1, "ham0"),
    (1, "ham0:/x/0/7/disk.0; touch PWNED"),
    (1, "ham0:/x/0/../7/disk.0"),
    (1, "ham0:x/disk.0"),
    (1, "ham0:/x/0/7/disk.-1"),
    (1, "ham0:/x/0/7/disk"),
    (2, "$(touch PWNED)"),
    (2, "-7"),
    (2, ""),
    (3, "100; touch PWNED"),
    (3, "../100"),
]


def test_words_that_opennebula_never_writes_are_refused_in_one_line(one: One) -> None:
    one.vm(one.disk())
    for place, word in REFUSED:
        words = [f"front:/var/lib/one//datastores/100/{HASH}", one.at(), "7", "100"]
        words[place] = word
        done = one.run("tm/forebay/clone", *words)
        assert (done.returncode, one.called()) == (1, []), word
        assert log(done).startswith("ERROR: clone: ")
    assert not (one.directory / "calls.ssh").exists()
    assert not list(one.directory.rglob("PWNED"))


def test_what_onevm_says_may_be_anything(one: One, content: bytes) -> None:
    for text in ("", "<VM", "<!DOCTYPE x [<!ENTITY a 'b'>]><VM>&a;</VM>", "<VM/>", "\0"):
        (one.directory / "show--x-7.xml").write_text(text)
        done = one.clone()
        assert (done.returncode, one.called()) == (1, [])
        assert log(done).startswith("ERROR: clone: ")
    (one.directory / "show--x-7.xml").unlink()
    assert "onevm show -x" in log(one.clone())


# ----------------------------------------------------------------------------------------------------------------- mvds


def write(one: One, name: str, pattern: int = 7) -> None:
    run(
        "qemu-io",
        "-f",
        "raw",
        "-c",
        f"write -P {pattern} 0 64k",
        "-c",
        "flush",
        one.gateway.uri(name),
    )


def test_the_end_of_a_persistent_disk_drains_it_and_is_done_when_it_is_not_known(
    one: One, content: bytes
) -> None:
    one.gateway.cli("attach", "one-7-0", f"one-100:{RAW}", "--mode", "write-back")
    write(one, "one-7-0")
    done = one.mvds(RAW)
    assert (done.returncode, log(done)) == (
        0,
        "INFO: mvds: one-7-0 on ham0 is written back and detached",
    )
    image = one.datastores / "100" / RAW
    assert image.read_bytes() == b"\7" * (64 << 10) + content[64 << 10 :]
    assert not Path(f"{image}.forebay").exists()
    again = one.mvds(RAW)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_disk_in_use_keeps_the_end_from_being_told_as_done(one: One, content: bytes) -> None:
    nbd = pytest.importorskip("nbd")
    one.gateway.cli("attach", "one-7-0", f"one-100:{RAW}")
    handle = nbd.NBD()
    handle.connect_uri(one.gateway.uri("one-7-0"))
    done = one.mvds(RAW)
    assert done.returncode == 1
    assert "1 client is connected" in log(done)
    assert log(done).endswith("onevm recover --retry 7")
    handle.shutdown()


def test_with_the_daemon_down_the_end_is_done_only_where_nothing_is_owed(
    one: One, content: bytes
) -> None:
    one.gateway.cli("attach", "one-7-0", f"one-100:{RAW}", "--mode", "write-back")
    write(one, "one-7-0")
    one.gateway.kill()
    done = one.mvds(RAW)
    assert done.returncode == 1
    assert re.search("not all in its image: .*no daemon at", log(done))
    one.gateway.start()
    assert one.mvds(RAW).returncode == 0
    one.gateway.stop()
    done = one.mvds(RAW)
    assert done.returncode == 0
    assert "WARNING: Forebay on ham0 does not answer; the image of one-7-0 is complete" in log(done)
    (one.directory / "off").touch()
    done = one.mvds(RAW)
    assert done.returncode == 1
    assert "No route to host" in log(done)


def test_on_a_host_without_forebay_the_end_is_done(one: One) -> None:
    (one.bin / "forebay").unlink()
    one.script(one.bin / "ssh", '#!/bin/sh\nshift\nPATH=/usr/bin:/bin exec sh -c "$*"\n')
    done = one.mvds(RAW)
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------------------------------------------- deploy


@pytest.fixture
def deployed(one: One) -> Callable[[bytes], list[str]]:
    """The stand-in for the host's script keeps what it is given; returns its words, checked for the domain."""
    one.script(
        one.on_host / "vmm/kvm/deploy",
        '#!/bin/bash\nprintf "%s\\n" "$@" >{directory}/words\ncat >"$1"\necho UUID\n',
    )

    def check(domain: bytes) -> list[str]:
        words = (one.directory / "words").read_text().splitlines()
        assert Path(words[0]).read_bytes() == domain
        return words

    return check


def test_a_persistent_disk_is_deployed_on_its_socket(
    one: One, deployed: Callable[[bytes], list[str]]
) -> None:
    vm = one.vm(one.persistent(CACHE_MODE="BACK", CACHE_SIZE="2048", PRELOAD_SIZE="1"), one.disk())
    domain = one.domain(one.disk_element(0) + one.disk_element(1, driver="cache='none'"))
    done = one.deploy(domain, vm)
    assert (done.returncode, done.stdout, done.stderr) == (0, "UUID\n", "")
    socket = f"{one.gateway.run}/disks/one-7-0.sock"
    source = f"<source file='{one.datastores}//0/7/disk.0'/>"
    now = f"<source protocol='nbd' name='one-7-0'><host transport='unix' socket='{socket}'/>"
    told = (
        f"<disks xmlns='urn:forebay:libvirt:1'><disk name='one-7-0' image='{one.datastores}/100/{HASH}' "
        "mode='BACK' cache-size='2048M' preload='1M'/></disks>"
    )
    expected = (
        domain.decode()
        .replace("<disk type='file' device='disk'>", "<disk type='network' device='disk'>", 1)
        .replace(source, f"{now}<reconnect delay='30'/></source>")
        .replace("cache='unsafe' io='native' discard='unmap'", "cache='none' discard='unmap'")
        .replace("\t</metadata>", f"\t{told}</metadata>")
    )
    words = deployed(expected.encode())
    assert words == [f"{one.sysdir}/deployment.0", "ham0", "7", "ham0"]
    assert (one.sysdir / "vm.xml").read_bytes() == vm
    assert (one.sysdir / "ds.xml").read_bytes() == b"<DATASTORE/>"


def test_a_vm_that_is_none_of_ours_deploys_as_before(
    one: One, deployed: Callable[[bytes], list[str]]
) -> None:
    domain = one.domain(one.disk_element())
    stock = one.persistent(TM_MAD="qcow2")
    for vm in (
        one.vm(stock),
        one.vm(one.disk()),
        one.vm(one.persistent(CACHE_MODE="NONE")),
        b"<VM/>",
    ):
        done = one.deploy(domain, vm)
        assert (done.returncode, done.stdout, done.stderr) == (0, "UUID\n", "")
        deployed(domain)


def test_whatever_cannot_be_read_deploys_as_before_with_one_line(
    one: One, deployed: Callable[[bytes], list[str]]
) -> None:
    vm, good = one.vm(one.persistent()), one.domain(one.disk_element())
    for domain, told in (
        (good, b"<VM"),
        (good, b""),
        (good, vm.replace(b"[raw]", b"[raw]").replace(HASH.encode(), b"..")),
        (good[:-12], vm),
        (good.replace(b"disk.0", b"disk.1"), vm),
        (one.domain("\0" + one.disk_element()), vm),
        (b"\xff" + good, vm),
    ):
        done = one.deploy(domain, told)
        assert (done.returncode, done.stdout) == (0, "UUID\n")
        assert re.fullmatch(
            r"INFO: deploy.forebay: WARNING: VM 7 starts without Forebay: .+\n", done.stderr
        ), done.stderr
        deployed(domain)
    (one.remotes / "tm/forebay/driver.conf").write_text("fallback = maybe\n")
    assert "driver.conf" in one.deploy(good, vm).stderr
    deployed(good)


def test_a_domain_that_is_too_long_is_refused_before_all_of_it_is_read(one: One) -> None:
    """A file of 1 TiB, which would not fit into memory."""
    one.deploy(one.domain(""), one.vm())
    file = one.location / "var/vms/7/deployment.0"
    os.truncate(file, 1 << 40)
    done = one.run("vmm/kvm/deploy.forebay", str(file), "ham0", "7", "ham0", stdin=b"x")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"ERROR: deploy.forebay: .* is longer than 16 MiB, .*\n", done.stderr)
    (one.location / "var/vms/7/vm.xml").write_bytes(b" " * (40 << 20))
    domain = one.domain(one.disk_element())
    file.write_bytes(domain)
    done = one.run("vmm/kvm/deploy.forebay", str(file), "ham0", "7", "ham0", stdin=b"x")
    assert "starts without Forebay" in done.stderr


def test_why_a_host_refuses_is_the_last_line(one: One) -> None:
    """As for the hook's line: daemon down, image of a dead host, still drained elsewhere, mounted soft."""
    one.script(
        one.on_host / "vmm/kvm/deploy", "#!/bin/sh\necho first >&2; echo why: do that >&2\nexit 3\n"
    )
    done = one.deploy(one.domain(one.disk_element()), one.vm(one.persistent()))
    assert (done.returncode, done.stdout) == (3, "")
    [*stock, last] = done.stderr.splitlines()
    assert stock == ["first", "why: do that"]
    assert last == "ERROR: deploy.forebay: VM 7 does not start on ham0: why: do that"
    (one.on_host / "vmm/kvm/deploy").unlink()
    done = one.deploy(one.domain(""), one.vm())
    assert "onehost sync --force" in done.stderr.splitlines()[-1]
    (one.directory / "off").touch()
    assert "No route to host" in one.deploy(one.domain(""), one.vm()).stderr.splitlines()[-1]


def test_a_deploy_finds_the_domain_in_what_it_is_given_where_the_file_is_gone(
    one: One, deployed: Callable[[bytes], list[str]]
) -> None:
    import base64

    domain = one.domain(one.disk_element())
    words = ("/none/deployment.3", "ham0", "7", "ham0")
    done = one.run("vmm/kvm/deploy.forebay", *words, stdin=base64.b64encode(domain))
    assert (done.returncode, done.stdout) == (0, "UUID\n")
    assert deployed(domain)[0] == f"{one.sysdir}/deployment.3"


# ---------------------------------------------------------------------------------------------------------- attach_disk


def test_a_persistent_disk_is_plugged_in_and_its_end_detaches_it(one: One, content: bytes) -> None:
    done = one.attach_disk(
        one.persistent(RAW, ATTACH="YES", CACHE_MODE="BACK", CACHE_SIZE="8", CACHE_WEIGHT="30")
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    told = one.gateway.status("one-7-0")
    assert (told["mode"], told["cache_size"], told["weight"]) == ("write-back", 8 * MIB, 30)
    plugged = (one.directory / "plugged").read_text()
    assert f"socket='{one.gateway.sock('one-7-0')}'" in plugged
    assert "<target dev='vdb'" in plugged
    assert "attach-device one-7 /dev/stdin" in (one.directory / "virsh").read_text()
    assert one.mvds(RAW).returncode == 0
    assert json.loads(one.gateway.cli("status", "--json").stdout) == []


def test_a_disk_that_cannot_be_plugged_in_is_not_left_attached(one: One, content: bytes) -> None:
    (one.directory / "virsh-fails").touch()
    done = one.attach_disk(one.persistent(RAW, ATTACH="YES"))
    assert done.returncode == 1
    assert (
        log(done) == "ERROR: attach_disk.forebay: one-7-0 is not plugged into one-7: error: planted"
    )
    assert json.loads(one.gateway.cli("status", "--json").stdout) == []
    done = one.attach_disk(one.persistent(RAW, ATTACH="YES", CACHE_MODE="FAST"))
    assert done.returncode == 1
    assert "FAST" in log(done)


def test_other_disks_are_plugged_in_by_the_hosts_own_script(one: One) -> None:
    for disk in (
        one.disk(ATTACH="YES"),
        one.persistent(ATTACH="YES", TM_MAD="ssh"),
        one.persistent(),
    ):
        one.calls.unlink(missing_ok=True)
        done = one.attach_disk(disk)
        assert (done.returncode, done.stderr) == (0, "")
        called = one.called()
        assert called[0] == f"{one.on_host}/vmm/kvm/attach_disk"
        assert called[1:5] == ["one-7", f"{one.datastores}//0/7/disk.0", "vdb", "1"]
        assert called[6:] == ["7", "ham0"]
    for message in ("", "!!!", "PFZN"):
        one.calls.unlink(missing_ok=True)
        done = one.run(
            "vmm/kvm/attach_disk.forebay", "one-7", "/x", "vdb", "1", message, "7", "ham0"
        )
        assert (done.returncode, one.called()[5]) == (0, message)


# ------------------------------------------------------------------------------------------------------ probe of a host


def test_the_probe_tells_the_scheduler_what_is_warm(one: One, content: bytes) -> None:
    one.vm(one.disk())
    assert one.clone().returncode == 0
    run("qemu-io", "-f", "qcow2", "-r", "-c", "read 0 2M", one.sysdir / "disk.0")
    done = one.run("im/kvm-probes.d/host/system/forebay.sh")
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (done.returncode, told["FOREBAY_STATE"], told["LS_MAD"]) == (0, '"ok"', '"file"')
    assert told["LS_MAX"] == "256"
    assert {"FOREBAY_VERSION", "LS_PATH", "LS_FREE", "FOREBAY_DIRTY", "FOREBAY_LAG"} < set(told)
    assert int(told[f"FOREBAY_WARM_{HASH[:12].upper()}"]) > 0
    one.gateway.stop()
    done = one.run("im/kvm-probes.d/host/system/forebay.sh")
    assert (done.returncode, 'FOREBAY_STATE="down"' in done.stdout) == (0, True)
