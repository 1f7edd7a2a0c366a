"""What the server answers in the handshake: exports, structured replies, metadata contexts. Pure, no bytes.

The state is what the client has agreed on so far; `export` is set when transmission begins.
"""

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
from forebay_nbd.server.export import Export, transmission_flags

Answer = ev.OptionReply | ev.ExportBegins


class Negotiation:
    """One client's haggling. `resolve("")` is the default export; `names` is what LIST shows."""

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
        """The client did not agree to NO_ZEROES."""
        self.structured = False
        self.contexts: dict[int, str] = {}
        """Selected metadata contexts by id; empty at GO unless they were selected for the same export name."""
        self._contexts_for: str | None = None
        self.export: Export | None = None
        self.export_name = ""

    def answer(self, option: ev.ClientOption) -> list[Answer]:
        """The replies to one option, in order. Raises ProtocolError where the only answer is to hang up."""
        number = option_number(option)
        match option:
            case ev.ExportName(name=name):
                return [self._begin(name)]
            case ev.InfoOption(name=name, wanted=wanted):
                return self._info(number, name, wanted)
            case ev.GoOption(name=name, wanted=wanted):
                return self._go(number, name, wanted)
            case ev.Abort():
                return [ev.Ack(number)]
            case ev.ListExports():
                return [*(ev.ExportListed(number, name) for name in self._names()), ev.Ack(number)]
            case ev.StructuredReplies():
                self.structured = True
                return [ev.Ack(number)]
            case ev.ListContexts(name=name, queries=queries):
                return self._list_contexts(number, name, queries)
            case ev.SetContexts(name=name, queries=queries):
                return self._set_contexts(number, name, queries)
            case _:
                return [self._refusal(number, option)]

    def _refusal(self, number: int, option: ev.ClientOption) -> ev.OptionError:
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
        if len(name.encode()) > self._name_bytes:
            return None
        export = self._resolve(name)
        if export is not None and not 0 <= export.size <= MAX_SIZE:
            raise ValueError(f"export {export.name!r} has an impossible size: {export.size}")
        return export

    def _begin(self, name: str) -> ev.ExportBegins:
        export = self._find(name)
        if export is None:
            raise ProtocolError("EXPORT_NAME of an export that does not exist")
        self._enter(name, export)
        return ev.ExportBegins(
            export.size, transmission_flags(export, self.structured), self.padding
        )

    def _enter(self, name: str, export: Export) -> None:
        if self._contexts_for != name:
            self._forget_contexts()
        self.export, self.export_name = export, name

    def _unknown(self, number: int) -> list[Answer]:
        # The name is not echoed: it may be 4096 bytes of anything (CVE-2020-10761).
        return [ev.OptionError(number, Rep.ERR_UNKNOWN, "there is no such export")]

    def _info(self, number: int, name: str, wanted: Iterable[int]) -> list[Answer]:
        export = self._find(name)
        if export is None:
            return self._unknown(number)
        replies: list[Answer] = [
            ev.ExportInfo(number, export.size, transmission_flags(export, self.structured))
        ]
        if Info.NAME in wanted:
            replies.append(ev.NameInfo(number, export.name))
        if Info.BLOCK_SIZE in wanted:
            replies.append(ev.BlockSizeInfo(number, 1, export.preferred_block, MAX_PAYLOAD))
        return [*replies, ev.Ack(number)]

    def _go(self, number: int, name: str, wanted: Iterable[int]) -> list[Answer]:
        replies = self._info(number, name, wanted)
        export = self._find(name)
        if export is not None:
            self._enter(name, export)
        return replies

    def _forget_contexts(self) -> None:
        self.contexts, self._contexts_for = {}, None

    def _list_contexts(self, number: int, name: str, queries: tuple[str, ...]) -> list[Answer]:
        if not self.structured:
            return [ev.OptionError(number, Rep.ERR_INVALID, "structured replies come first")]
        export = self._find(name)
        if export is None:
            return self._unknown(number)
        if any(":" not in query for query in queries):
            return [ev.OptionError(number, Rep.ERR_INVALID, "a query has a namespace and a colon")]
        # "the metadata context ID in these replies is reserved and SHOULD be set to zero"
        found = [c for c in _available(export) if not queries or any(_lists(q, c) for q in queries)]
        return [*(ev.ContextListed(number, 0, context) for context in found), ev.Ack(number)]

    def _set_contexts(self, number: int, name: str, queries: tuple[str, ...]) -> list[Answer]:
        self._forget_contexts()  # "including when this command fails"
        if not self.structured:
            return [ev.OptionError(number, Rep.ERR_INVALID, "structured replies come first")]
        export = self._find(name)
        if export is None:
            return self._unknown(number)
        if any(":" not in query for query in queries):
            return [ev.OptionError(number, Rep.ERR_INVALID, "a query has a namespace and a colon")]
        found = [context for context in _available(export) if context in queries]
        self.contexts = dict(enumerate(found, start=1))
        self._contexts_for = name
        return [*(ev.ContextListed(number, i, c) for i, c in self.contexts.items()), ev.Ack(number)]


def _available(export: Export) -> tuple[str, ...]:
    return (BASE_ALLOCATION, *export.contexts)


def _lists(query: str, context: str) -> bool:
    """Does a LIST_META_CONTEXT query name the context? An empty leaf is a wildcard of its namespace."""
    return query == context or (query.endswith(":") and context.startswith(query))
