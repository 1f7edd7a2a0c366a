# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""OpenNebula's drivers: what they read, and how a domain is taken to Forebay without touching the rest of it."""

import ast
import base64
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree as ET

import pytest

from forebay.libvirt.domain import read_domain
from forebay.units import MIB, Mode
from forebay_one import rank
from forebay_one.deploy import beside, decoded
from forebay_one.domain import directory_of, through_forebay
from forebay_one.remote import checked_host, in_uri, run, words
from forebay_one.vm import (
    MOST_XML,
    OF_VM,
    Disk,
    DiskPath,
    Failed,
    disks,
    image_on_host,
    normalised,
    read_xml,
)

ADDON = Path(__file__).resolve().parents[2] / "config" / "opennebula"

HASH = "0123456789abcdef0123456789abcdef"
BASE = "/var/lib/one/datastores"


def disk(number: int = 0, **given: str) -> Disk:
    return Disk(
        {
            "TM_MAD": "forebay", "CLONE": "NO", "FORMAT": "raw", "TYPE": "FILE", "DISK_ID": str(number),
            "SOURCE": f"/var/lib/one//datastores/100/{HASH}", **given,
        }
    )  # fmt: skip


BEFORE = f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
	<name>one-7</name>
	<devices>
		<emulator><![CDATA[/usr/bin/qemu-system-x86_64]]></emulator>
		<disk type='file' device='disk'>
			<source file='{BASE}//0/7/disk.0'/>
			<target dev='vda'/>
			<driver name='qemu' type='raw' cache='unsafe' io='native' discard='unmap'/>
		</disk>
		<disk type="file" device="disk" snapshot='no'>
			<driver name='qemu' type='raw' cache='writeback'></driver>
			<source file="{BASE}/0//7/disk.1" index='1'><seclabel model='dac'/></source>
			<!-- <disk> --><target dev='vdb'/>
		</disk>
		<disk type='file' device='cdrom'>
			<source file='{BASE}//0/7/disk.2'/>
			<target dev='hda'/><readonly/>
		</disk>
		<disk type='file' device='disk'><source file='{BASE}//0/7/disk.10'/><target dev='vdc'/></disk>
	</devices>
	<qemu:commandline>
		<qemu:arg value='-foo'/>
	</qemu:commandline>
	<metadata>
		<one:vm xmlns:one="http://opennebula.org/xmlns/libvirt/1.0">
			<one:system_datastore><![CDATA[{BASE}//0/7]]></one:system_datastore>
		</one:vm>
	</metadata>
</domain>
"""
FIRST = f"""<disk type='network' device='disk'>
			<source protocol='nbd' name='one-7-0'>\
<host transport='unix' socket='/run/forebay/disks/one-7-0.sock'/><reconnect delay='30'/></source>
			<target dev='vda'/>
			<driver name='qemu' type='raw' cache='none' discard='unmap'/>
		</disk>"""  # noqa: F541


def rewritten(*wanted: Disk, before: str = BEFORE) -> str:
    return through_forebay(before.encode(), "7", wanted, "/run/forebay").decode()


def test_only_the_disks_that_are_meant_are_changed_and_every_other_byte_stays() -> None:
    text = rewritten(
        disk(CACHE_MODE="BACK", CACHE_SIZE="2048", PRELOAD_SIZE="512", CACHE_WEIGHT="7")
    )
    old = BEFORE[BEFORE.index("<disk type") : BEFORE.index("</disk>") + len("</disk>")]
    told = (
        f"<disks xmlns='urn:forebay:libvirt:1'><disk name='one-7-0' image='{BASE}/100/{HASH}' mode='BACK' "
        "cache-size='2048M' preload='512M' weight='7'/></disks></metadata>"
    )
    assert text == BEFORE.replace(old, FIRST).replace("</metadata>", told)


def test_the_hook_reads_what_it_is_told() -> None:
    text = rewritten(
        disk(0, CACHE_MODE="OFFLINE", PRELOAD_SIZE="all", READONLY="YES"), disk(1, CACHE_SIZE="1.5")
    )
    [one, other] = read_domain(text).disks
    image = f"{BASE}/100/{HASH}"
    assert (one.name, one.image, one.mode, one.preload, one.read_only) == (
        ("one-7-0", image, Mode.FULL_COPY, "all", True)
    )
    assert (other.name, other.mode, other.cache_size) == ("one-7-1", None, 3 * MIB // 2)
    elements = ET.fromstring(text).findall("./devices/disk")
    assert [x.get("type") for x in elements] == ["network", "network", "file", "file"]
    assert elements[1].find("driver").attrib["cache"] == "writeback"  # type: ignore[union-attr]


@pytest.mark.parametrize("metadata", ["<metadata/>", "<metadata a='b'></metadata>"])
def test_metadata_may_be_empty(metadata: str) -> None:
    text = BEFORE[: BEFORE.index("<metadata>")] + metadata + "</domain>"
    assert [x.name for x in read_domain(rewritten(disk(), before=text)).disks] == ["one-7-0"]


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a<b", "a&b", "a b", "é", "]]>"])
def test_values_cannot_leave_their_attribute(name: str) -> None:
    text = rewritten(disk(SOURCE=f"/x/100/{name}", CACHE_MODE="a'/><disk name=\"b\n"))
    assert text.isascii()
    [told] = ET.fromstring(text).iterfind("./metadata/{urn:forebay:libvirt:1}disks/*")
    assert (told.get("image"), told.get("mode")) == (
        f"{BASE}/100/{name}",
        "a'/><disk name=\"b",
    )


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (BEFORE[:-20], "cannot be read"),
        (BEFORE.replace("disk.0'", "disk.0'>"), "cannot be read"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]>" + BEFORE, "no document type"),
        (BEFORE.replace("disk.0'", "disk.7'"), "0 disks that are"),
        (BEFORE.replace('disk.1"', 'disk.0"'), "2 disks that are"),
        (BEFORE.replace("type='file'", "type='block'"), "0 disks that are"),
        (BEFORE[: BEFORE.index("<metadata>")] + "</domain>", "no metadata"),
        ("\0", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_not_as_opennebula_writes_it_is_refused(before: str, says: str) -> None:
    with pytest.raises(Failed, match=says):
        rewritten(disk(), before=before)


def test_where_the_vm_is_is_found_however_broken_the_domain_is() -> None:
    assert directory_of(BEFORE.encode()) == f"{BASE}/0/7"
    assert directory_of(BEFORE.encode()[:-30]) == f"{BASE}/0/7"
    assert (
        directory_of(BEFORE.replace("]]>", "").replace("<![CDATA[", "").encode()) == f"{BASE}/0/7"
    )
    assert directory_of(BEFORE.encode()[:400]) == f"{BASE}/0/7"
    raw = "<metadata><one:vm><one:system_datastore>/etc</one:system_datastore></one:vm></metadata>"
    for before in (BEFORE, BEFORE[:-30]):
        hostile = before.replace("<qemu:commandline>", f"{raw}<qemu:commandline>")
        assert directory_of(hostile.encode()) == f"{BASE}/0/7"
    for text in (b"", b"\xff", b"<one:system_datastore>../x</one:system_datastore>"):
        with pytest.raises(Failed, match="in which directory"):
            directory_of(text)
    with pytest.raises(Failed, match="not an absolute path"):
        directory_of(b"<one:system_datastore>/x/../y</one:system_datastore>")


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ({}, True),
        ({"TM_MAD": "qcow2"}, False),
        ({"CLONE": "YES"}, False),
        ({"FORMAT": "qcow2"}, False),
        ({"TYPE": "CDROM"}, False),
        ({"CACHE_MODE": "none"}, False),
        ({"CACHE_MODE": "BACK"}, True),
    ],
)
def test_which_disks_are_served(given: dict[str, str], served: bool) -> None:
    assert disk(0, **given).is_served == served


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", "512M"), ("1.5", "1.5M"), ("20G", "20G"), ("64 KiB", "64 KiB"), ("", ""), ("all", "all")],
)  # fmt: skip
def test_a_bare_number_is_mb(text: str, size: str) -> None:
    assert disk(CACHE_SIZE=text).size("CACHE_SIZE") == size


def test_paths_are_those_of_the_host() -> None:
    assert normalised("//a///b/./c") == "/a/b/c"
    at = DiskPath.read("/srv//ds/0/7/disk.3")
    assert (at.directory, at.id) == ("/srv/ds/0/7", 3)
    assert image_on_host("/var/lib/one//datastores/100/x", "/srv/ds/0/7") == "/srv/ds/100/x"
    for path in ("a", "/a/../b", "/a\n/b", ""):
        with pytest.raises(Failed):
            normalised(path)
    for source in ("/x", "/", "/100/..", ""):
        with pytest.raises(Failed):
            image_on_host(source, "/srv/ds/0/7")


def test_what_the_driver_writes_beside_is_base64_and_may_be_plain(tmp_path: Path) -> None:
    for content in (b"<VM/>", base64.b64encode(b"<VM/>")):
        (tmp_path / "vm.xml").write_bytes(content)
        assert beside(str(tmp_path / "deployment.0"), "vm.xml") == b"<VM/>"
    assert beside(str(tmp_path / "deployment.0"), "ds.xml") == b""
    assert decoded(b"!") == b""


def test_a_document_type_is_refused_and_a_user_may_write_of_one() -> None:
    for read in (read_xml, disks):
        with pytest.raises(Failed, match="document type"):
            read(b"<!DOCTYPE x [<!ENTITY a 'b'>]><VM>&a;</VM>")
        with pytest.raises(Failed, match="cannot be read"):
            read(b"<VM><TEMPLATE></VM>")
        with pytest.raises(Failed, match="too long"):
            read(b" " * (MOST_XML + 1))
    vm = b"<VM><N><![CDATA[<!DOCTYPE]]></N><TEMPLATE><DISK><A>1</A></DISK></TEMPLATE></VM>"
    assert [x.attributes for x in disks(vm)] == [{"A": "1"}]
    assert read_xml(vm).findtext("N") == "<!DOCTYPE"


def test_disks_are_those_of_the_template_and_what_is_within_an_attribute_is_none() -> None:
    vm = (
        b"<VM><DISK><A>0</A></DISK><TEMPLATE><DISK/><DISK><A><![CDATA[1]]> &amp;<B>2</B>3</A><C/>4</DISK>"
        b"<NIC><A>5</A></NIC></TEMPLATE><X><TEMPLATE><DISK><A>6</A></DISK></TEMPLATE></X></VM>"
    )
    expected = [{}, {"A": "1 &", "C": ""}]
    assert [x.attributes for x in disks(vm)] == expected
    assert [x.attributes for x in disks(b"<M>" + vm + b"</M>", ("VM", *OF_VM))] == expected
    assert disks(b"<M>" + vm + b"</M>") == []


IMPORTED = """
import sys
from forebay_one import clone, remote
print(sorted({"re", "typing", "subprocess", "pathlib", "shlex", "xml", "urllib", "enum"} & set(sys.modules)))
"""


def test_a_clone_imports_little() -> None:
    driver = ADDON / "remotes/tm/forebay"
    done = subprocess.run(
        [sys.executable, "-SE", "-c", IMPORTED], cwd=driver, check=True, capture_output=True
    )
    assert done.stdout == b"[]\n"


@pytest.mark.parametrize(
    "word", ["", "a", "a b", "'", "$(x)", "é", "-", "a\n", "\\", 'a"b', "~", "x=y", "*"]
)
def test_a_word_stays_what_it_is_for_a_shell(word: str) -> None:
    assert words(word) == shlex.quote(word)
    assert words("a", word) == f"a {shlex.quote(word)}"
    assert (in_uri(word), in_uri(f"/{word}", "/")) == (quote(word, safe=""), quote(f"/{word}"))


@pytest.mark.parametrize("host", ["", "-x", ".a", "@a", "a b", "a\n", "é", "a" * 256, "a;b", "a/b"])
def test_what_ssh_could_take_for_something_else_is_no_host(host: str) -> None:
    with pytest.raises(Failed, match="not the name of a host"):
        checked_host(host)
    assert [checked_host(x) for x in ("a", "_a-b.c", "root@a")] == ["a", "_a-b.c", "root@a"]


def test_a_program_is_given_and_says_more_than_a_pipe_holds() -> None:
    given = b"x" * (1 << 20)
    assert run(["sh", "-c", "cat; cat >&2 </dev/null; exit 3"], given) == (3, given, b"")
    with pytest.raises(FileNotFoundError):
        run(["/nowhere/at/all"])


# ----------------------------------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize(
    ("required", "now"),
    [
        ("", ""),
        ('CLUSTER_ID = "1"', '(CLUSTER_ID = \\"1\\") & '),
        ("(A = 1 | B = 2)", "(A = 1 | B = 2) & "),
        ("(A = 1) | (B = 2)", "((A = 1) | (B = 2)) & "),
        ('(A = 1) & FOREBAY_STATE = "ok" & LS_FREE > 7', "(A = 1) & "),
        ('FOREBAY_STATE = "ok" & LS_FREE > 7', ""),
        ('FOREBAY_STATE = "ok" & LS_FREE > 7 & A = 1', "(A = 1) & "),
        ('(A = 1) & FOREBAY_STATE="ok" & LS_FREE>7 & B = 2', "((A = 1) & B = 2) & "),
    ],
)
def test_rank_keeps_what_a_template_requires_besides(required: str, now: str) -> None:
    template = ET.fromstring("<VMTEMPLATE><TEMPLATE><SCHED_REQUIREMENTS/></TEMPLATE></VMTEMPLATE>")
    template.find("./TEMPLATE/SCHED_REQUIREMENTS").text = required  # type: ignore[union-attr]
    sources = [f"/d/100/{HASH}", f"/d/100/{HASH}", "/d/100/other.iso", "/d/101/" + "f" * 32]
    assert rank.written(template, sources, 10000) == (
        'SCHED_RANK="FOREBAY_WARM_0123456789AB * 100 + FOREBAY_WARM_FFFFFFFFFFFF * 100 + FREE_CPU"\n'
        f'SCHED_REQUIREMENTS="{now}FOREBAY_STATE = \\"ok\\" & LS_FREE > 10000"\n'
    )


@pytest.mark.parametrize(
    "required",
    [
        'FOREBAY_STATE = "slow"',
        '(FOREBAY_STATE = "ok" & LS_FREE > 7) | A = 1',
        '(FOREBAY_STATE = "ok" & LS_FREE > 7 & A = 1) | B = 1',
        'FOREBAY_STATE = "ok" & LS_FREE > 7 | A = 1',
    ],
)
def test_what_nobody_can_tell_apart_is_not_written_over(required: str) -> None:
    template = ET.fromstring("<VMTEMPLATE><TEMPLATE><SCHED_REQUIREMENTS/></TEMPLATE></VMTEMPLATE>")
    template.find("./TEMPLATE/SCHED_REQUIREMENTS").text = required  # type: ignore[union-attr]
    with pytest.raises(Failed, match="by hand"):
        rank.written(template, [f"/d/100/{HASH}"], 10000)


def test_a_template_without_images_has_no_rank() -> None:
    with pytest.raises(Failed, match="no image"):
        rank.written(ET.fromstring("<VMTEMPLATE/>"), [], 1)


def test_the_front_end_may_have_python_3_9() -> None:
    found = [
        x
        for x in (ADDON / "remotes").rglob("*")
        if x.suffix == ".py" or x.name in ("clone", "mvds")
    ]
    assert len(found) > 8
    for path in [*found, ADDON / "bin/forebay-one", *(ADDON / "remotes/vmm/kvm").iterdir()]:
        ast.parse(path.read_text(), feature_version=(3, 9))
