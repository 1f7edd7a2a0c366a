# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the server answers to options: exports, structured replies, metadata contexts. No I/O and no bytes here."""

from collections.abc import Callable, Iterable

from forebay_nbd.protocol import events as ev
from forebay_nbd.protocol.options import option_number
from forebay_nbd.protocol.wire import (
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    MAX_SIZE,
    MAX_STRING,
    Info,
    Opt,
    ProtocolError,
    Rep,
)
from forebay_nbd.server.export import Export, Refused, transmission_flags


class Negotiation:
    """The server's side of one handshake: it answers options, and keeps what was agreed on so far.

    `resolve` returns the export of a name, or None; resolve("") is the default export. It may raise Refused. `names`
    returns what LIST shows.
    Names longer than `name_bytes` bytes are unknown.
    """

    def __init__(
        self,
        resolve: Callable[[str], Export | None],
        names: Callable[[], list[str]],
        name_bytes: int = MAX_STRING,
    ) -> None:
        self._resolve = resolve
        self._names = names
        self._name_bytes = name_bytes
        self.padding = False
        """The client did not agree to NO_ZEROES, so the reply to EXPORT_NAME is padded."""
        self.structured = False
        """The client asked for structured replies."""
        self.contexts: dict[int, str] = {}
        """The metadata contexts that were selected, by the number under which BLOCK_STATUS tells about them. At the end
        of the handshake it is empty unless they were selected for the export, by the same name."""
        self._contexts_for: str | None = None
        """The name of the export for which they were selected."""
        self.export: Export | None = None
        """The export of GO or EXPORT_NAME; None before that."""
        self.export_name = ""
        """The name by which the client asked for it, which may be empty."""

    def answer(self, option: ev.ClientOption) -> list[ev.HandshakeReply]:
        """The replies to one option, in order.

        Raises ProtocolError for EXPORT_NAME of an unknown export, since no reply refuses that option, and ValueError if
        the size of an export is impossible, which is a bug of whoever made it.
        """
        number = option_number(option)
        try:
            return self._answer(number, option)
        except Refused as refused:
            if isinstance(option, ev.ExportName):
                raise ProtocolError(f"EXPORT_NAME: {refused}") from None
            return [ev.OptionError(number, refused.reply, refused.reason)]

    def _answer(self, number: int, option: ev.ClientOption) -> list[ev.HandshakeReply]:
        """As answer(). Raises Refused, too."""
        match option:
            case ev.ExportName(name=name):
                return [self._answer_export_name(name)]
            case ev.InfoOption(name=name, wanted=wanted):
                return self._answer_info(number, name, wanted)
            case ev.GoOption(name=name, wanted=wanted):
                return self._answer_go(number, name, wanted)
            case ev.Abort():
                return [ev.Ack(number)]
            case ev.ListExports():
                return [*(ev.ExportListed(number, name) for name in self._names()), ev.Ack(number)]
            case ev.StructuredReplies():
                self.structured = True
                return [ev.Ack(number)]
            case ev.ListContexts(name=name, queries=queries):
                return self._answer_list_contexts(number, name, queries)
            case ev.SetContexts(name=name, queries=queries):
                return self._answer_set_contexts(number, name, queries)
            case _:
                return [self._refusal(number, option)]

    def _refusal(self, number: int, option: ev.ClientOption) -> ev.OptionError:
        """The reply to an option that is refused whatever its data are."""
        match option:
            case ev.StartTls():
                # TLS belongs to the nbdkit front end: known here, and refused by policy ("NOTLS mode").
                return ev.OptionError(number, Rep.ERR_POLICY, "this server does not encrypt")
            case ev.BadOption(reason=reason, reply=reply):
                if number == Opt.SET_META_CONTEXT:
                    self._forget_contexts()
                return ev.OptionError(number, reply, reason)
            case _:
                return ev.OptionError(number, Rep.ERR_UNSUP, "unknown option")

    def _find(self, name: str) -> Export | None:
        """The export of a name, None if there is none. Raises ValueError if its size is impossible."""
        if len(name.encode()) > self._name_bytes:
            return None
        export = self._resolve(name)
        if export is not None and not 0 <= export.size <= MAX_SIZE:
            raise ValueError(f"export {export.name!r} has an impossible size: {export.size}")
        return export

    def _answer_export_name(self, name: str) -> ev.ExportBegins:
        export = self._find(name)
        if export is None:
            raise ProtocolError("EXPORT_NAME of an export that does not exist")
        self._set_export(name, export)
        return ev.ExportBegins(
            export.size, transmission_flags(export, self.structured), self.padding
        )

    def _set_export(self, name: str, export: Export) -> None:
        """Called when transmission is about to begin on an export."""
        if self._contexts_for != name:
            self._forget_contexts()
        self.export, self.export_name = export, name

    def _unknown_export(self, number: int) -> list[ev.HandshakeReply]:
        # The name is not echoed: it may be 4096 bytes of anything (CVE-2020-10761).
        return [ev.OptionError(number, Rep.ERR_UNKNOWN, "there is no such export")]

    def _answer_info(
        self, number: int, name: str, wanted: Iterable[int]
    ) -> list[ev.HandshakeReply]:
        """The replies to INFO, and to GO: size and flags, what else is `wanted` (Info), the end."""
        export = self._find(name)
        if export is None:
            return self._unknown_export(number)
        replies: list[ev.HandshakeReply] = [
            ev.ExportInfo(number, export.size, transmission_flags(export, self.structured))
        ]
        if Info.NAME in wanted:
            replies.append(ev.NameInfo(number, name or export.name))
        if Info.BLOCK_SIZE in wanted:
            replies.append(ev.BlockSizeInfo(number, 1, export.preferred_block, MAX_PAYLOAD))
        return [*replies, ev.Ack(number)]

    def _answer_go(self, number: int, name: str, wanted: Iterable[int]) -> list[ev.HandshakeReply]:
        replies = self._answer_info(number, name, wanted)
        export = self._find(name)
        if export is not None:
            self._set_export(name, export)
        return replies

    def _forget_contexts(self) -> None:
        self.contexts, self._contexts_for = {}, None

    def _answer_list_contexts(
        self, number: int, name: str, queries: tuple[str, ...]
    ) -> list[ev.HandshakeReply]:
        if not self.structured:
            return [ev.OptionError(number, Rep.ERR_INVALID, "structured replies come first")]
        export = self._find(name)
        if export is None:
            return self._unknown_export(number)
        if any(":" not in query for query in queries):
            return [ev.OptionError(number, Rep.ERR_INVALID, "a query has a namespace and a colon")]
        # "the metadata context ID in these replies is reserved and SHOULD be set to zero"
        found = [
            c for c in _available(export) if not queries or any(_is_match(q, c) for q in queries)
        ]
        return [*(ev.ContextListed(number, 0, context) for context in found), ev.Ack(number)]

    def _answer_set_contexts(
        self, number: int, name: str, queries: tuple[str, ...]
    ) -> list[ev.HandshakeReply]:
        self._forget_contexts()  # "including when this command fails"
        if not self.structured:
            return [ev.OptionError(number, Rep.ERR_INVALID, "structured replies come first")]
        export = self._find(name)
        if export is None:
            return self._unknown_export(number)
        if any(":" not in query for query in queries):
            return [ev.OptionError(number, Rep.ERR_INVALID, "a query has a namespace and a colon")]
        found = [context for context in _available(export) if context in queries]
        self.contexts = dict(enumerate(found, start=1))
        self._contexts_for = name
        return [*(ev.ContextListed(number, i, c) for i, c in self.contexts.items()), ev.Ack(number)]


def _available(export: Export) -> tuple[str, ...]:
    """The metadata contexts of an export."""
    return (BASE_ALLOCATION, *export.contexts)


def _is_match(query: str, context: str) -> bool:
    """True if a query of LIST_META_CONTEXT matches the context: by its name, or by "namespace:" alone."""
    return query == context or (query.endswith(":") and context.startswith(query))
