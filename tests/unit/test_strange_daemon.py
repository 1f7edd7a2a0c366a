# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the command says where something answers at the control socket that is no daemon, or not one it understands."""

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forebay import client
from forebay.cli.main import main
from unit.control_fake import disk


def http(content: Any, status: bytes = b"200 OK") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\n\r\n" + body


ANSWERS = {
    "nothing": b"",
    "another protocol": b"220 smtp ready\r\n\r\n",
    "bytes": bytes(range(256)) * 8,
    "no status": b"HTTP/1.1\r\n\r\n[]",
    "a status without bounds": b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\n\r\n[]",
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000,
    "an empty body": http(b""),
    "no JSON": http(b"<html>\x1b[2J"),
    "a number": http(5),
    "a list of numbers": http([1, 2]),
    "an empty object": http({}),
    "an object without what is asked for": http([{"name": "a"}]),
    "null for everything": http([dict.fromkeys(disk("a"))]),
    "a text for a number": http([disk("a") | {"size": "large"}]),
    "a number for a text": http([disk("a") | {"name": 5}]),
    "infinity": http([disk("a") | {"size": float("inf")}]),
    "depth": http(b"[" * 100_000),
    "an error without text": http({}, b"500 No"),
    "an error that is a list": http([], b"404 No"),
    "an error that is a number": http({"error": 7}, b"409 No"),
    "an error with a holder that is a text": http({"error": "in use", "holder": "x"}, b"409 No"),
    "an error with escapes": http({"error": "\x1b[2J\x1b]0;gone\x07"}, b"409 No"),
    "progress that is none": http(b'{"done": "much", "total": []}\n'),
    "a result that is a list": http(b'{"result": [1]}\n'),
    "no result": http(b'{"result": null}\n'),
}

COMMANDS = (
    "status", "status a", "stats", "stats a", "attach a images:x", "detach a", "flush", "mode a wb", "preload a 1M",
    "xml a", "xml a --metadata", "cache info", "cache scrub",
)  # fmt: skip


@contextmanager
def answering(folder: Path, answer: bytes) -> Iterator[str]:
    """The configuration of a command at whose socket each connection gets that answer."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "control.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if not connection.recv(1 << 16):
                    return
                try:
                    connection.sendall(answer)
                except OSError:
                    pass  # it has read enough

    thread = threading.Thread(target=serve)
    thread.start()
    file = folder / "forebay.toml"
    file.write_text(f'[gateway]\nrun = "{folder}"\n')
    try:
        yield str(file)
    finally:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(folder / "control.sock"))
        thread.join()
        listener.close()


@pytest.mark.parametrize(("what", "answer"), ANSWERS.items(), ids=ANSWERS)
def test_what_cannot_be_understood_is_one_line_and_code_1(
    what: str, answer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(tmp_path, answer) as config:
        for command in COMMANDS:
            code = main(["--config", config, *command.split()])
            out, err = capsys.readouterr()
            said = f"{command}: {what}: {code}: {out}{err}"
            assert "\x1b" not in out + err, said
            assert code in (0, 1), said
            if code:
                assert len(err.splitlines()) == 1, said
                assert err.startswith("forebay: "), said


def test_an_answer_that_does_not_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_ANSWER", 1 << 16)
    with (
        answering(tmp_path, http(b"[" + b" " * (1 << 18) + b"]")),
        pytest.raises(client.StrangeAnswerError, match="is longer than"),
    ):
        client.Client(str(tmp_path / "control.sock")).get("/disks")


def test_what_later_versions_add_is_no_fault(tmp_path: Path) -> None:
    later = [disk("a") | {"new": {"name": "x", "deep": [1]}}]
    with answering(tmp_path, http(later)):
        assert client.Client(str(tmp_path / "control.sock")).get("/disks") == later


def test_every_kind_of_key_is_checked() -> None:
    strange = itertools.product(("name", "size", "lag_seconds", "faults"), ({}, [], "x", 5))
    found = []
    for key, value in strange:
        try:
            client.Client._decode(client.Client("/x"), json.dumps({key: value}).encode())
        except client.StrangeAnswerError:
            found.append((key, value))
    assert len(found) == 12
