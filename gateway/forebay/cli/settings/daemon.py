# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay reload`, and `forebay dump-config`: the configuration of a daemon that runs, and that of the files."""

from forebay.cli.asking import Arguments, daemon, print_json
from forebay.cli.terminal.parser import Parser


def add_reload(parser: Parser) -> None:
    """Add the arguments of `forebay reload`."""
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def add_dump(parser: Parser) -> None:
    """Add the arguments of `forebay dump-config`."""
    text = "what holds in the daemon that runs, instead of what the files say"
    parser.add_argument("--running", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def reload(arguments: Arguments) -> int:
    """`forebay reload`: have the daemon take its configuration anew."""
    found = daemon(arguments).post("/reload", {})
    lines = found.pop("lines")
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(str(line) for line in lines))
    return 0


def dump_config(arguments: Arguments) -> int:
    """`forebay dump-config`: print what holds, defaults included, in the form of the file."""
    running = daemon(arguments).get("/config")["toml"] if arguments.running else None
    if running is not None and not arguments.json:
        print(running)
        return 0
    import tomllib

    from forebay.config.model import Config

    if running is None:
        config = Config.load(arguments.config)
    else:
        config = Config.model_validate(tomllib.loads(running))
    print(config.model_dump_json(indent=2) if arguments.json else config.to_toml())
    return 0
