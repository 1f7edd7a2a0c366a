"""The client's side of the handshake as a conversation: what to ask next, given the answers. Pure, no I/O."""

import errno
from collections.abc import Generator
from dataclasses import dataclass, field

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.wire import (
    MAX_PAYLOAD,
    MAX_SIZE,
    Flag,
    HandshakeFlag,
    Info,
    ProtocolError,
    Rep,
)

Question = ev.ClientFlags | ev.ClientOption
Answers = list[ev.OptionReply | ev.ExportBegins]
"""All replies to one option, the last of which ends it. Empty for ClientFlags."""


@dataclass(frozen=True)
class Terms:
    """What client and server have agreed on. Sizes in bytes."""

    size: int
    flags: int
    structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD


def haggle(
    greeting: ev.Greeting, export: str, contexts: tuple[str, ...]
) -> Generator[Question, Answers, Terms]:
    """Yields what to say, is sent the answers, returns the terms.

    Raises OSError(ENOENT) for an unknown export, ConnectionError for what we cannot do, ProtocolError for nonsense.
    """
    both = greeting.flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    yield ev.ClientFlags(both)
    if not both & HandshakeFlag.FIXED_NEWSTYLE:
        return (yield from _by_name(export, False, {}))
    structured = _agreed((yield ev.StructuredReplies()))
    selected: dict[int, str] = {}
    if structured and contexts:
        replies = yield ev.SetContexts(export, contexts)
        if _agreed(replies):
            selected = {r.context_id: r.name for r in replies if isinstance(r, ev.ContextListed)}
    replies = yield ev.GoOption(export, (Info.BLOCK_SIZE,))
    end = replies[-1]
    if isinstance(end, ev.OptionError):
        if end.code != Rep.ERR_UNSUP:
            raise refusal(end, export)
        return (yield from _by_name(export, structured, selected))
    return _terms(replies, structured, selected)


def _agreed(replies: Answers) -> bool:
    """Did the server accept? TLS is the one refusal that will meet everything else, too."""
    end = replies[-1]
    if isinstance(end, ev.OptionError) and end.code == Rep.ERR_TLS_REQD:
        raise refusal(end, "")
    return isinstance(end, ev.Ack)


def _by_name(
    export: str, structured: bool, contexts: dict[int, str]
) -> Generator[Question, Answers, Terms]:
    (begin,) = yield ev.ExportName(export)
    if not isinstance(begin, ev.ExportBegins):
        raise ProtocolError("EXPORT_NAME was answered like another option")
    return _checked(Terms(begin.size, begin.flags, structured, contexts))


def _terms(replies: Answers, structured: bool, contexts: dict[int, str]) -> Terms:
    info = next((r for r in replies if isinstance(r, ev.ExportInfo)), None)
    if info is None:
        raise ProtocolError("the server told no size")
    blocks = next((r for r in replies if isinstance(r, ev.BlockSizeInfo)), None)
    if blocks is None:
        return _checked(Terms(info.size, info.flags, structured, contexts))
    return _checked(
        Terms(
            info.size,
            info.flags,
            structured,
            contexts,
            blocks.minimum,
            blocks.preferred,
            min(blocks.maximum, MAX_PAYLOAD),
        )
    )


def _checked(terms: Terms) -> Terms:
    if terms.size > MAX_SIZE:
        raise ProtocolError(f"an export of {terms.size} bytes")
    if not terms.flags & Flag.HAS_FLAGS:
        raise ProtocolError(f"transmission flags {terms.flags:#x}")
    low, high = terms.minimum_block, terms.maximum_payload
    if not 0 < low <= 65536 or low & (low - 1) or high < low:
        raise ProtocolError(f"block sizes {low} to {high}")
    return terms


def refusal(error: ev.OptionError, export: str) -> OSError:
    """The exception for an export that the server does not give us."""
    why = f" ({error.text[:256]})" if error.text else ""
    if error.code == Rep.ERR_UNKNOWN:
        return OSError(errno.ENOENT, f"the server has no export {export!r}")
    if error.code == Rep.ERR_TLS_REQD:
        return ConnectionError(f"the server wants TLS, which this client does not speak{why}")
    if error.code == Rep.ERR_SHUTDOWN:
        return ConnectionError(f"the server is shutting down{why}")
    return ConnectionError(
        f"the server refuses export {export!r}: error {error.code & 0xFFFF}{why}"
    )
