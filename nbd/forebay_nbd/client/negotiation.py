# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the client sends in the handshake, given the server's replies so far. No I/O happens here."""

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

ClientMessage = ev.ClientFlags | ev.ClientOption
"""What a client sends in the handshake."""
Replies = list[ev.HandshakeReply]
"""All replies to one option, in order; the last one is Ack, OptionError or ExportBegins. To ClientFlags there is
none."""


@dataclass(frozen=True)
class Negotiated:
    """What client and server agreed on in the handshake. Sizes in bytes."""

    size: int
    flags: int
    """Transmission flags (Flag) of the export."""
    structured: bool = False
    """READs and BLOCK_STATUS are answered with structured replies."""
    contexts: dict[int, str] = field(default_factory=dict)
    """The metadata contexts that were selected, by the number that BLOCK_STATUS chunks carry."""
    minimum_block: int = 1
    """Offsets and lengths of requests have to be multiples of this power of two."""
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD

    @property
    def read_only(self) -> bool:
        """True if the server takes no writes."""
        return bool(self.flags & Flag.READ_ONLY)


def negotiate(
    greeting: ev.Greeting,
    export: str,
    contexts: tuple[str, ...],
    *,
    structured: bool = True,
    block_sizes: bool = True,
) -> Generator[ClientMessage, Replies, Negotiated]:
    """Asks for an export with block sizes, and if `structured` with structured replies and the contexts `contexts`.

    Without `block_sizes` they are not asked for: then the server takes requests of any alignment.

    The generator yields each message to be sent, is sent the replies to it, and returns what was agreed on. Structured
    replies, contexts and block sizes are used if the server has them, and done without if it has not.

    Raises OSError(ENOENT) for an unknown export, ConnectionError if the server refuses the export for another reason or
    wants TLS, and ProtocolError if its replies contradict the protocol.
    """
    both = greeting.flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    yield ev.ClientFlags(both)
    if not both & HandshakeFlag.FIXED_NEWSTYLE:
        return (yield from _use_export_name(export, False, {}))
    structured = structured and _is_accepted((yield ev.StructuredReplies()))
    selected: dict[int, str] = {}
    if structured and contexts:
        replies = yield ev.SetContexts(export, contexts)
        if _is_accepted(replies):
            selected = {r.context_id: r.name for r in replies if isinstance(r, ev.ContextListed)}
    replies = yield ev.GoOption(export, (Info.BLOCK_SIZE,) if block_sizes else ())
    end = replies[-1]
    if isinstance(end, ev.OptionError):
        if end.code != Rep.ERR_UNSUP:
            raise _refusal(end, export)
        return (yield from _use_export_name(export, structured, selected))
    return _from_go(replies, structured, selected)


def _is_accepted(replies: Replies) -> bool:
    """True if the server acknowledged an option.

    Raises ConnectionError if it wants TLS first: it would refuse every further option for the same reason.
    """
    end = replies[-1]
    if isinstance(end, ev.OptionError) and end.code == Rep.ERR_TLS_REQD:
        raise _refusal(end, "")
    return isinstance(end, ev.Ack)


def _use_export_name(
    export: str, structured: bool, contexts: dict[int, str]
) -> Generator[ClientMessage, Replies, Negotiated]:
    """Begins transmission with EXPORT_NAME, for servers that do not know GO."""
    (begin,) = yield ev.ExportName(export)
    if not isinstance(begin, ev.ExportBegins):
        raise ProtocolError("EXPORT_NAME was answered like another option")
    return _checked(Negotiated(begin.size, begin.flags, structured, contexts))


def _from_go(replies: Replies, structured: bool, contexts: dict[int, str]) -> Negotiated:
    """What was agreed on, from the replies to a GO that was acknowledged. Raises ProtocolError."""
    info = next((r for r in replies if isinstance(r, ev.ExportInfo)), None)
    if info is None:
        raise ProtocolError("the server told no size")
    blocks = next((r for r in replies if isinstance(r, ev.BlockSizeInfo)), None)
    if blocks is None:
        return _checked(Negotiated(info.size, info.flags, structured, contexts))
    return _checked(
        Negotiated(
            info.size,
            info.flags,
            structured,
            contexts,
            blocks.minimum,
            blocks.preferred,
            min(blocks.maximum, MAX_PAYLOAD),
        )
    )


def _checked(negotiated: Negotiated) -> Negotiated:
    """Returns its argument. Raises ProtocolError for a size, flags or block sizes that the protocol does not allow."""
    if negotiated.size > MAX_SIZE:
        raise ProtocolError(f"an export of {negotiated.size} bytes")
    if not negotiated.flags & Flag.HAS_FLAGS:
        raise ProtocolError(f"transmission flags {negotiated.flags:#x}")
    low, high = negotiated.minimum_block, negotiated.maximum_payload
    if not 0 < low <= 65536 or low & (low - 1) or high < low:
        raise ProtocolError(f"block sizes {low} to {high}")
    return negotiated


def _refusal(error: ev.OptionError, export: str) -> OSError:
    """The exception to be raised when the server refuses the export: OSError(ENOENT) if it has none of that name."""
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
