# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Stands for `lvm` where the kernel has no device-mapper: logical volumes are loop devices.

It takes the command lines that were recorded from the real one (Debian 12's 2.03.16 on a kernel with device-mapper),
word for word, refuses every other with exit code 3, and answers with reports of the recorded form. What it did is in
`FAKE_LVM/calls`, one command a line; what there is in `FAKE_LVM/state.json`.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

HOME = Path(os.environ.get("FAKE_LVM", "/nonexistent"))
EXTENT = 4 << 20
UNITS = ["--units", "b", "--nosuffix", "-S"]
LVS = ["--reportformat", "json", "-o"]
LVS += ["lv_name,vg_name,lv_size,lv_path,lv_tags,lv_attr,devices,lv_uuid", *UNITS]
VGS = ["--reportformat", "json", "-o", "vg_name,vg_uuid,vg_size,vg_free,vg_extent_size", *UNITS]
PVS = ["--reportformat", "json", "-o", "pv_name,vg_name,pv_size,pv_free,pv_tags", *UNITS]

State = dict[str, Any]


def fail(text: str, code: int = 5) -> NoReturn:
    print("  WARNING: this is not the first line to show.", file=sys.stderr)
    print(f"  {text}", file=sys.stderr)
    sys.exit(code)


def unknown(words: list[str]) -> NoReturn:
    fail(f"not a command line on record: {words}", 3)


def report(key: str, rows: list[dict[str, str]]) -> None:
    print(json.dumps({"report": [{key: rows}]}, indent=4))


def used(state: State, pv: str) -> int:
    return sum(sum(n for p, n in lv["segments"] if p == pv) for lv in state["lvs"])


def free(state: State, pv: str) -> int:
    return int(state["pvs"][pv]["size"]) - used(state, pv)


def is_open(lv: State) -> bool:
    try:
        os.close(os.open(lv["loop"], os.O_RDWR | os.O_EXCL))
    except OSError:
        return True
    return False


# ------------------------------------------------------------------------------------------ reports


def lvs(state: State, words: list[str]) -> None:
    if words[:-1] != LVS:
        unknown(words)
    rows = []
    for lv in state["lvs"]:
        by_name = f"vg_name={state['vg']} && lv_name={lv['name']}"
        by_tag = words[-1].removeprefix("lv_tags=")
        if words[-1] != by_name and by_tag not in lv["tags"]:
            continue
        for pv, _ in lv["segments"]:
            rows.append(
                {
                    "lv_name": lv["name"],
                    "vg_name": state["vg"],
                    "lv_size": str(lv["size"]),
                    "lv_path": str(HOME / "dev" / state["vg"] / lv["name"]),
                    "lv_tags": ",".join(lv["tags"]),
                    "lv_attr": f"-wi-{'a' if lv['active'] else '-'}{'o' if is_open(lv) else '-'}----",
                    "devices": f"{pv}(0)",
                    "lv_uuid": lv["uuid"],
                }
            )
    report("lv", rows)


def vgs(state: State, words: list[str]) -> None:
    if words[:-1] != VGS:
        unknown(words)
    if words[-1] != f"vg_name={state['vg']}":
        report("vg", [])
        return
    row = {
        "vg_name": state["vg"],
        "vg_uuid": "iCWbMB-JgpD-ZJyr-cCvB-J1cE-4SDV-vEYQbF",
        "vg_size": str(sum(pv["size"] for pv in state["pvs"].values())),
        "vg_free": str(sum(free(state, pv) for pv in state["pvs"])),
        "vg_extent_size": str(EXTENT),
    }
    report("vg", [row])


def pvs(state: State, words: list[str]) -> None:
    if words[:-1] != PVS or words[-1] != f"vg_name={state['vg']}":
        unknown(words)
    rows = [
        {
            "pv_name": name,
            "vg_name": state["vg"],
            "pv_size": str(pv["size"]),
            "pv_free": str(free(state, name)),
            "pv_tags": ",".join(pv["tags"]),
        }
        for name, pv in state["pvs"].items()
    ]
    report("pv", rows)


# ------------------------------------------------------------------------------------------ changes


def allocate(state: State, size: int, place: str | None) -> list[list[Any]]:
    need, segments = size, []
    for name, pv in state["pvs"].items():
        if place is None or place.removeprefix("@") in pv["tags"]:
            part = min(need, free(state, name))
            if part:
                segments.append([name, part])
                need -= part
    if need:
        fail("Insufficient free space")
    return segments


def extents(text: str) -> int:
    if not re.fullmatch(r"[0-9]+b", text):
        unknown([text])
    return -(-int(text[:-1]) // EXTENT) * EXTENT


def lvcreate(state: State, words: list[str]) -> None:
    """lvcreate -y -Zy -Wy -L SIZEb -n NAME --addtag T --addtag T VG [@TAG]"""
    if words[:4] != ["-y", "-Zy", "-Wy", "-L"] or words[5] != "-n":
        unknown(words)
    size, name, rest = extents(words[4]), words[6], words[7:]
    tags = []
    while rest[0] == "--addtag":
        tags.append(rest[1])
        rest = rest[2:]
    if rest[0] != state["vg"] or len(rest) > 2:
        unknown(words)
    if any(lv["name"] == name for lv in state["lvs"]):
        fail(f'Logical Volume "{name}" already exists in volume group "{state["vg"]}"')
    segments = allocate(state, size, rest[1] if len(rest) == 2 else None)
    add(state, name, size, tags, segments)


def add(state: State, name: str, size: int, tags: list[str], segments: list[list[Any]]) -> None:
    state["made"] += 1
    backing = HOME / f"lv{state['made']}"
    with backing.open("wb") as file:
        file.truncate(size)
    made = ["losetup", "--find", "--show", str(backing)]
    loop = subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()
    directory = HOME / "dev" / state["vg"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(loop)
    lv = {"name": name, "size": size, "tags": tags, "segments": segments, "active": True}
    uuid = f"Wq3h5D-{state['made']:04d}-NnTL-cCvB-J1cE-4SDV-vEYQbF"
    state["lvs"].append({**lv, "loop": loop, "backing": str(backing), "uuid": uuid})


def volume(state: State, label: str) -> State:
    for lv in state["lvs"]:
        if label == f"{state['vg']}/{lv['name']}":
            found: State = lv
            return found
    fail(f'Failed to find logical volume "{label}"')


def lvextend(state: State, words: list[str]) -> None:
    """lvextend -L SIZEb VG/LV [@TAG]"""
    if words[0] != "-L" or len(words) not in (3, 4):
        unknown(words)
    size, lv = extents(words[1]), volume(state, words[2])
    if size <= lv["size"]:
        fail("New size given (...) not larger than existing size (...)")
    lv["segments"] += allocate(state, size - lv["size"], words[3] if len(words) == 4 else None)
    lv["size"] = size
    os.truncate(lv["backing"], size)
    subprocess.run(["losetup", "--set-capacity", lv["loop"]], check=True)


def lvremove(state: State, words: list[str]) -> None:
    """lvremove -y VG/LV"""
    if words[0] != "-y" or len(words) != 2:
        unknown(words)
    lv = volume(state, words[1])
    if is_open(lv):
        fail(f"Logical volume {words[1]} in use.")
    drop(state, lv)


def drop(state: State, lv: State) -> None:
    subprocess.run(["losetup", "--detach", lv["loop"]], check=True)
    (HOME / "dev" / state["vg"] / lv["name"]).unlink()
    Path(lv["backing"]).unlink()
    state["lvs"] = [other for other in state["lvs"] if other["uuid"] != lv["uuid"]]


def lvchange(state: State, words: list[str]) -> None:
    """lvchange --deltag T --addtag T VG/LV"""
    if (words[0], words[2]) != ("--deltag", "--addtag") or len(words) != 5:
        unknown(words)
    lv = volume(state, words[4])
    lv["tags"] = [tag for tag in lv["tags"] if tag != words[1]] + [words[3]]


COMMANDS = {
    "lvs": lvs,
    "vgs": vgs,
    "pvs": pvs,
    "lvcreate": lvcreate,
    "lvextend": lvextend,
    "lvremove": lvremove,
    "lvchange": lvchange,
}


def main() -> None:
    command, *words = sys.argv[1:]
    if os.environ.get("LC_ALL") != "C" or command not in COMMANDS:
        unknown(sys.argv)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (HOME / "calls").open("a") as calls:
            calls.write(" ".join([command, *words]) + "\n")
        state = json.loads((HOME / "state.json").read_text())
        if state["kill"] == f"before {command}":
            os.kill(os.getppid(), signal.SIGKILL)
            sys.exit(1)
        if state["fail"].get(command):
            fail(state["fail"][command])
        COMMANDS[command](state, words)
        partial = HOME / "state.new"
        partial.write_text(json.dumps(state, indent=2))
        partial.rename(HOME / "state.json")
        if state["kill"] == f"after {command}":
            os.kill(os.getppid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
