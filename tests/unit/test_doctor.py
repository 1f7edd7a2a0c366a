# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The doctor: what its checks say of a host, of a daemon, of places; and what never gets into its bundle."""

import json
import os
import stat
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from forebay.cli.main import main
from forebay.config.model import Config, DiskSettings, Mode, Store
from forebay.config.sections import CacheSection, GatewaySection
from forebay.doctor import bundle, daemon, host, places, probe, run
from forebay.doctor.bundle import write
from forebay.doctor.daemon import ANSWERS, Daemon, ask, check, check_config
from forebay.doctor.finding import CODES, Finding, Level, fault, ok, unknown, warning, worst
from forebay.doctor.probe import Look, User, look
from forebay.doctor.secrets import without_secrets
from forebay.errors import ForebayError
from forebay.origin.mounts import parse
from forebay.units import GIB, MIB
from unit.control_fake import CACHE, FakeGateway, disk, served

ME = User(os.geteuid(), os.getegid())
NOBODY = User(65534, 65534)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as somebody else")


def levels(found: Any) -> list[tuple[str, str]]:
    return [(one.check, one.level.value) for one in found]


# ------------------------------------------------------------------------------------------------------------- findings


def test_the_worst_finding_is_the_exit_code() -> None:
    found = [ok("a", "x"), unknown("b", "x", "y"), warning("c", "x", "y"), fault("d", "x", "y")]
    assert [CODES[worst(found[:n])] for n in range(5)] == [0, 0, 1, 1, 2]
    assert (
        fault("store", "it is away", "mount it").line() == "fault    store     it is away: mount it"
    )
    assert ok("time", "fine").line() == "ok       time      fine"


def test_a_check_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(daemon, "check", broken)
    monkeypatch.setattr(host, "check", lambda _: iter([ok("kernel", "x")]))
    found = list(run.checked(None, Daemon("/x")))
    assert levels(found) == [("doctor", "unknown"), ("kernel", "ok")]


# --------------------------------------------------------------------------------------------------------------- daemon


def answering(**differs: Any) -> Daemon:
    """A daemon that answered; what is not said is well."""
    told: dict[str, Any] = {what: {} for what in ANSWERS}
    told |= {"gateway": {"forebay": "0.1.0", "core": True}, "disks": [disk("vm1")]}
    told |= {"cache": CACHE | {"private_bytes": 0}}
    return Daemon("/x", pid=7, user=ME, told=told | differs)


def test_a_daemon_that_is_well_is_four_good_lines() -> None:
    found = list(check(answering()))
    assert levels(found) == [(name, "ok") for name in ("daemon", "disks", "lag", "cache")]


def test_without_a_daemon_one_line_says_how_to_start_it(tmp_path: Path) -> None:
    (found,) = check(ask(str(tmp_path / "control.sock")))
    assert found.level is Level.FAULT
    assert found.todo.startswith("start it with 'forebay serve'")


@pytest.mark.parametrize(
    ("differs", "level", "said"),
    [
        ({"gateway": {"forebay": "0.0.9"}}, "warning", "daemon    version 0.0.9, and this command"),
        ({"gateway": {"error": "what"}}, "unknown", "daemon    what"),
        ({"gateway": {"forebay": "0.1.0", "core": False}}, "warning", "the compiled core does not"),
        (
            {"gateway": {"forebay": "0.1.0", "a_bytes": 95, "a_limit_bytes": 100}},
            "warning",
            "memory    a: 95 of 100",
        ),
        (
            {"disks": [disk("v", state="conflict", reason="v changed: resolve it")]},
            "fault",
            "disks     v is conflict: v changed: resolve it",
        ),
        ({"disks": [disk("v", state="lagging", reason="full")]}, "warning", "v is lagging: full"),
        (
            {"disks": [disk("v", lag_seconds=61.0, max_lag_seconds=30.0)]},
            "warning",
            "lag       v is 1m01s behind",
        ),
        (
            {"cache": CACHE | {"private_bytes": 0, "state": "failed", "error": "I/O error"}},
            "fault",
            "cache     /dev/vg0/forebay: failed: I/O error",
        ),
        ({"cache": CACHE | {"private_bytes": 0, "damaged_slots": 3}}, "warning", "3 blocks of"),
        ({"cache": CACHE | {"private_bytes": 19 * GIB}}, "warning", "19G of 20G belong to single"),
        ({"cache": {"error": "no"}}, "unknown", "cache     no"),
    ],
)
def test_what_is_wrong_with_a_daemon_is_told(
    differs: dict[str, Any], level: str, said: str
) -> None:
    bad = [one for one in check(answering(**differs)) if one.level is not Level.OK]
    assert [one.level.value for one in bad] == [level]
    assert said in bad[0].line()
    assert bad[0].todo


@pytest.mark.parametrize("state", ["incoming", "handed-over"])
def test_a_disk_whose_vm_moves_is_fine(state: str) -> None:
    found = list(check(answering(disks=[disk("v", state=state, reason="it moves")])))
    assert {one.level for one in found} == {Level.OK}


def test_a_daemon_that_has_not_what_the_files_say_is_told(tmp_path: Path) -> None:
    there = Config(stores={"a": Store(path=tmp_path)}).at(run=tmp_path)
    told = {"config": {"toml": there.to_toml()}}
    assert list(check_config(Config(stores=there.stores), answering(**told))) == []
    stores = {"a": Store(path=tmp_path, max_lag=3.0), "b": Store(path=tmp_path / "b")}
    other = Config(
        stores=stores, defaults=DiskSettings(max_dirty=5), cache=CacheSection(size=1 << 32)
    )
    reload, restart = check_config(other, answering(**told))
    assert (reload.level, reload.todo) == (Level.WARNING, "systemctl reload forebay")
    assert reload.text.endswith(": defaults.max_dirty, stores.a, stores.b")
    assert (restart.level, restart.todo) == (Level.WARNING, "systemctl restart forebay")
    assert restart.text.endswith(": cache.size")
    assert list(check_config(other, answering(config={"error": "no route"}))) == []


async def test_a_daemon_is_asked_for_all_of_it() -> None:
    import trio

    async with served(FakeGateway("a")) as run_directory:
        found = await trio.to_thread.run_sync(ask, str(run_directory / "control.sock"))
    assert found.answers
    assert (found.pid, found.user.uid) == (os.getpid(), os.geteuid())
    assert set(found.told) == set(ANSWERS)


# --------------------------------------------------------------------------------------------------------------- places


def test_a_path_is_looked_at_by_a_child(tmp_path: Path) -> None:
    seen = look(str(tmp_path), ME)
    assert (seen.kind, seen.may_read, seen.may_write) == ("dir", True, True)
    assert seen.device == tmp_path.stat().st_dev
    assert 0 < seen.free <= seen.size
    (tmp_path / "f").write_text("x")
    assert look(str(tmp_path / "f"), ME).kind == "file"
    assert look(str(tmp_path / "none"), ME).kind == "missing"
    assert look(str(tmp_path / "f" / "g"), ME).error == "Not a directory"


@as_root
def test_a_path_is_looked_at_as_the_daemons_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    inner = tmp_path / "inner"
    inner.mkdir(mode=0o700)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o001)
    seen = look(str(inner), NOBODY)
    assert (seen.may_read, seen.may_write, seen.owner) == (False, False, "root:root")
    assert look(str(inner / "deep"), NOBODY).error == "Permission denied"


def test_a_path_that_hangs_is_told_and_its_child_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(_: str) -> dict[str, Any]:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(1000)
        return {}

    monkeypatch.setattr(probe, "seen", hang)
    assert look("/x", ME, 0.5).kind == "hangs"
    if (tmp_path / "pid").exists():
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


@pytest.mark.parametrize("what", ["raise", "babble"])
def test_a_child_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fail(_: str) -> dict[str, Any]:
        if what == "raise":
            raise ZeroDivisionError
        return {"no": "field"}

    monkeypatch.setattr(probe, "seen", fail)
    assert look("/x", ME).kind == "error"


def config(tmp_path: Path, **differs: Any) -> Config:
    (tmp_path / "store").mkdir(exist_ok=True)
    base: dict[str, Any] = {
        "gateway": GatewaySection(state=tmp_path, run=tmp_path, socket_group=None, socket_peers=[]),
        "stores": {"images": Store(path=tmp_path / "store")},
    }
    return Config(**(base | differs))


def test_places_that_are_as_they_should_be(tmp_path: Path) -> None:
    found = list(places.check(config(tmp_path), Daemon("/x", "no daemon", user=ME)))
    names = ("device", "index", "sockets", "store")
    assert levels(found) == [(name, "ok") for name in names], found


DEVICE = "/dev/vg0/gone"
DIR: dict[str, Any] = {
    "kind": "dir",
    "owner": f"{ME.name}:x",
    "may_read": True,
    "may_write": True,
    "free": GIB,
    "size": 2 * GIB,
}
SHUT: dict[str, Any] = {
    "kind": "dir",
    "owner": "root:root",
    "mode": 0o700,
    "free": GIB,
    "size": 2 * GIB,
}


@pytest.mark.parametrize(
    ("where", "seen", "level", "said"),
    [
        ("store", Look("missing"), "fault", "is not there: mount it, or correct its path"),
        ("store", Look("hangs", "no answer within 5 s"), "fault", "see whether its server is up"),
        ("store", Look("error", "Stale file handle"), "fault", "Stale file handle: see that"),
        ("store", Look("file"), "fault", "is no directory"),
        ("store", Look(**SHUT), "fault", "mode 0700"),
        ("store", Look(**DIR | {"may_write": False}), "warning", "may not make files there"),
        ("store", Look(**DIR | {"free": MIB}), "fault", "make room there"),
        ("store", Look(**DIR | {"free": 50 * MIB}), "warning", "make room there"),
        ("cache.img", Look("error", "Permission denied"), "fault", "Permission denied"),
        ("cache.img", Look("device", may_read=True), "fault", "the udev rule does that"),
        ("index", Look(**SHUT), "fault", "chown -R"),
        ("index", Look(**DIR | {"free": MIB}), "fault", "make room there"),
        ("run", Look(**SHUT), "fault", "or correct gateway.run"),
    ],
)
def test_what_is_wrong_with_a_place_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    seen: Look,
    level: str,
    said: str,
) -> None:
    monkeypatch.setattr(
        places, "look", lambda path, _: seen if Path(path).name == where else Look(**DIR)
    )
    gateway = GatewaySection(state=tmp_path, run=tmp_path / "run", socket_peers=["root"])
    found = list(places.check(config(tmp_path, gateway=gateway), Daemon("/x", "no", user=ME)))
    bad = [one for one in found if one.level is not Level.OK and one.check != "udev"]
    assert [one.level.value for one in bad] == [level], found
    assert said in bad[0].line()


@as_root
def test_a_state_of_another_user_is_refused_to_roots_daemon(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY.uid, NOBODY.gid)
    found = list(places.check(config(tmp_path), Daemon("/x", "no", user=ME)))
    (bad,) = [one for one in found if one.level is not Level.OK]
    assert "belongs to nobody: root's daemon refuses it: run the daemon as nobody" in bad.line()


def test_a_device_that_is_gone_is_a_fault(tmp_path: Path) -> None:
    absent = config(tmp_path, cache=CacheSection(device=Path(DEVICE)))
    found = list(places.check(absent, Daemon("/x", "no", user=ME)))
    assert found[0].line().startswith(f"fault    device    {DEVICE} is not there: activate it")


LINE = "98 29 0:51 / /mnt/nfs rw,relatime shared:1 - nfs4 nas:/export {options}\n"


@pytest.mark.parametrize(
    ("options", "mode", "level", "said"),
    [
        ("rw,vers=4.2,hard", Mode.WRITE_BACK, "ok", "(nfs4 hard,vers=4.2)"),
        ("rw,vers=4.2,soft", Mode.WRITE_BACK, "fault", "mount it hard"),
        ("rw,vers=4.2,soft", Mode.WRITE_THROUGH, "warning", "mount it hard"),
        ("rw,vers=3,hard", Mode.WRITE_BACK, "fault", "mount it with vers=4.2"),
        ("rw,vers=3,nolock,hard", Mode.WRITE_THROUGH, "warning", "mount it with locks"),
        ("ro,vers=4.2,hard", Mode.WRITE_BACK, "fault", "mount it for writing"),
        ("ro,vers=4.2,hard", Mode.WRITE_THROUGH, "ok", "vers=4.2"),
    ],
)
def test_how_a_store_is_mounted_is_looked_at(
    options: str, mode: Mode, level: str, said: str
) -> None:
    elsewhere = LINE.replace("/mnt/nfs rw", "/elsewhere ro").format(options=options)
    mounts = parse(LINE.format(options=options) + elsewhere)
    is_ro = options.startswith("ro")
    seen = Look(**DIR | {"device": os.makedev(0, 51), "read_only": is_ro})
    (found,) = places._mounted("s: /mnt/nfs", DiskSettings(mode=mode), seen, ME, mounts)
    assert (found.level.value, said in found.line()) == (level, True), found


def test_a_place_that_is_mounted_read_only_is_seen_so(tmp_path: Path) -> None:
    assert look(str(tmp_path), ME).read_only is False
    assert look("/proc/sys", ME).read_only is bool(os.statvfs("/proc/sys").f_flag & os.ST_RDONLY)


def test_a_store_whose_file_system_is_not_mounted_is_seen_by_fstab(tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(
        "# nas:/x /mnt/nfs nfs4\nnas:/y /mnt/nfs nfs4 hard 0 0\nUUID=1 / ext4\nnone none swap\nx\n"
    )
    mounted = parse(LINE.format(options="rw"))
    assert places.missing_mount("/mnt/nfs/images", [], fstab) == "/mnt/nfs"
    assert places.missing_mount("/mnt/nfs", [], fstab) == "/mnt/nfs"
    assert places.missing_mount("/mnt/nfs/images", mounted, fstab) is None
    assert places.missing_mount("/mnt/nfs2", [], fstab) is None
    assert places.missing_mount("/mnt/nfs", [], tmp_path / "none") is None


def test_a_user_who_cannot_look_says_that() -> None:
    other = User(os.geteuid() + 12345, 1)
    if os.geteuid() == 0:
        assert other.may_be_taken
        return
    (found,) = places.check(Config(), Daemon("/x", "no", user=other))
    assert (found.level, found.todo) == (Level.UNKNOWN, "run it as root")


# ----------------------------------------------------------------------------------------------------------------- host


@pytest.mark.parametrize(
    ("differs", "level", "said"),
    [
        ({}, "ok", "and started at boot"),
        ({"LoadState": "not-found"}, "warning", "is not installed"),
        ({"ActiveState": "failed"}, "fault", "has failed"),
        ({"NeedDaemonReload": "yes"}, "warning", "systemctl daemon-reload"),
        ({"UnitFileState": "disabled"}, "warning", "systemctl enable forebay"),
        ({"NRestarts": "3"}, "warning", "after 3 restarts by itself"),
    ],
)
def test_the_unit_is_looked_at(differs: dict[str, str], level: str, said: str) -> None:
    told = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running"}
    told |= {"UnitFileState": "enabled", "NRestarts": "0", "NeedDaemonReload": "no"}
    text = "".join(f"{key}={value}\n" for key, value in (told | differs).items())
    found = host.of_unit(text)
    assert (found.level.value, said in found.line()) == (level, True), found
    assert host.of_unit("").level is Level.UNKNOWN


def test_kernel_memory_and_clock_are_looked_at(tmp_path: Path) -> None:
    assert host._kernel("5.4.0-1-amd64").level is Level.FAULT
    assert host._kernel("6.1.0").level is Level.OK
    assert host._kernel("strange").level is Level.OK
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:     1000 kB\n")
    assert levels(host._memory(meminfo)) == [("memory", "warning")]
    meminfo.write_text("MemAvailable:  9000000 kB\n")
    assert levels(host._memory(meminfo)) == []
    (found,) = host._clock()
    assert found.check == "time"
    assert [one.level.value for one in host._limits(Daemon("/x", pid=os.getpid()))] in (
        ["ok"],
        ["warning"],
    )


def test_a_program_that_hangs_or_is_not_there_tells_nothing() -> None:
    assert host.asked(["sleep", "100"], 0.1) is None
    assert host.asked(["no-such-program"]) is None
    assert host.asked(["echo", "a"]) == "a\n"


# -------------------------------------------------------------------------------------------------------------- secrets

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAAhidden\n-----END OPENSSH PRIVATE KEY-----"
SECRET = [
    "nbd://user:hidden@storage1/disk",
    "https://hidden@web.example.org/a.raw",
    '"image": "https://u:hidden@h/x?X-Amz-Signature=hidden&token=hidden"',
    "https://h/a.raw?sig=hidden#x",
    "nbds://h/x?tls-psk-file=/hidden",
    'password = "hidden"',
    "password: hidden",
    '{"api_token": "hidden", "x": 1}',
    '{"apiKey": "hid\\"hidden"}',
    "AWS_SECRET_ACCESS_KEY=hidden",
    "mount -o username=x,password=hidden,vers=3",
    "Authorization: Bearer hidden",
    "curl -H 'authorization: Basic hidden'",
    "qemu --password hidden -x",
    "set-cookie: hidden",
    "psk=hidden",
    "tokens = ['hidden', 'hidden']",
    KEY,
    KEY[:50] + "hidden",
]


@pytest.mark.parametrize("text", SECRET)
def test_what_is_secret_is_replaced(text: str) -> None:
    assert "hidden" not in without_secrets(text)
    assert "***" in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "nbd+unix:///vm1?socket=/run/forebay/disks/vm1.sock",
        "vm1: pass-through: cache device fails",
        "images:debian12.raw",
        "nas:/export on /mnt/nfs type nfs4 (rw,vers=4.2,hard)",
        '"read_hits": 900, "state": "ready"',
        "https://web.example.org/images/a.raw",
        "forebay attach vm1 images:a.raw --preload 1G",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_long_text_takes_time_that_grows_with_it() -> None:
    pieces = ("x" * 200_000, "-" * 200_000, "://" * 50_000, "token" * 40_000, '"' * 100_000)
    for piece in pieces:
        without_secrets(piece)  # minutes, where it would grow with the square


# --------------------------------------------------------------------------------------------------------------- bundle


def test_a_bundle_has_what_a_report_needs_and_no_secret(tmp_path: Path) -> None:
    source = tmp_path / "forebay.toml"
    source.write_text(
        '# password = "hidden"\n[origins]\nnbd = ["nbd://u:hidden@s/*"]\n[gateway]\nsocket_group = "root"\n'
    )
    told = answering(disks=[disk("vm1", image="nbd://u:hidden@s/x")])
    found = [fault("store", "https://u:hidden@h: away", "mount it")]
    path = tmp_path / "report.tgz"
    names = write(path, Config.load(source), told, found)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as tar:
        members = {one.name: tar.extractfile(one) for one in tar}
        texts = {name: file.read().decode() for name, file in members.items() if file}
    assert set(texts) == {f"forebay-report/{name}" for name in names}
    assert {"doctor.txt", "settings.toml", "forebay.toml", "daemon/disks.json"} <= set(names)
    assert not [name for name, text in texts.items() if "hidden" in text]
    assert "images" not in texts["forebay-report/doctor.txt"]
    assert json.loads(texts["forebay-report/daemon/disks.json"])[0]["image"] == "nbd://***@s/x"


@pytest.mark.parametrize("name", ["journal.log", "unit.txt"])
def test_what_is_too_long_is_cut_before_it_is_looked_through_and_through_no_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "LONGEST", 2000)
    monkeypatch.setattr(bundle, "EDGE", 500)
    looked = list[int]()

    def count(text: str) -> str:
        looked.append(len(text))
        return without_secrets(text)

    monkeypatch.setattr(bundle, "without_secrets", count)
    secret = f"{KEY}\npassword=hidden\n"
    for before in range(1800, 2700, 7):  # a cut goes through it wherever it can
        pieces = ["x y\n" * 5000, secret, "z\n" * (before // 2)]
        text = "".join(pieces if name.endswith(".log") else reversed(pieces))
        found = bundle.kept(name, text)
        assert "hidden" not in found
        assert not [line for line in KEY.splitlines()[1:-1] if line in found]
        assert 1000 < len(found) <= 2500
    assert max(looked) == 2500


def test_a_bundle_replaces_nothing_and_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.tgz"
    path.write_text("mine")
    with pytest.raises(ForebayError, match="is there already"):
        write(path, None, answering(), [])
    assert path.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForebayError, match="is there already"):
        write(link, None, answering(), [])
    with pytest.raises(ForebayError, match="No such file or directory: choose another place"):
        write(tmp_path / "none" / "x", None, answering(), [])
    with pytest.raises(TypeError):
        write(tmp_path / "half", None, answering(disks=object()), [])
    assert not (tmp_path / "half").exists()


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_line_for_each_check_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "check", lambda _: iter([warning("time", "\x1b[2Jx", "y")]))
    monkeypatch.setattr(places, "check", lambda *_: iter([ok("device", "x")]))
    source = tmp_path / "forebay.toml"
    source.write_text(f'[gateway]\nrun = "{tmp_path}"\nsocket_group = "root"\n')
    assert main(["doctor", "--config", str(source)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "config"],
        ["fault", "daemon"],
        ["ok", "device"],
        ["warning", "time"],
    ]
    assert "\x1b" not in "".join(lines)
    monkeypatch.setattr(daemon, "check", lambda _: iter([ok("daemon", "x")]))
    assert main(["doctor", "--config", str(source), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["level"], len(told["findings"])) == (1, "warning", 4)
    source.write_text("[gateway]\nfoo = 1\n[cache]\nsize = 5\n")
    assert main(["doctor", "--config", str(source), "--json"]) == 2
    found = [Finding(**one) for one in json.loads(capsys.readouterr().out)["findings"]]
    assert [one.level for one in found if one.check == "config"] == ["fault", "fault"]
    bundle = tmp_path / "b.tgz"
    assert main(["doctor", "--config", str(source), "--bundle", str(bundle)]) == 2
    assert "read them before you send them" in capsys.readouterr().err
    assert tarfile.is_tarfile(bundle)
