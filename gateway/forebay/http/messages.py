# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A request, and what is answered."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

JSON = "application/json"
PLAIN_TEXT = "text/plain; charset=utf-8"

MOST_PARAMETERS = 100
"""Parameters of a query. The longest sensible one has some ten."""


class HTTPException(Exception):
    """A request that cannot be answered: a status, and one line that says why."""

    def __init__(self, status_code: int, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status_code = status_code
        self.detail = detail
        self.headers = dict(headers or {})


class HungUp(Exception):
    """The client is gone."""


class Request:
    """One request, as it came."""

    def __init__(
        self,
        method: str,
        target: str,
        parts: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`target` as on the request's first line; `parts` gives the body, and is closed once it is not wanted;
        `headers` by their names in lower case.

        Raises HTTPException (400) for a target that is no path with a query.
        """
        path, _, query = target.partition("?")
        if not path.startswith("/"):
            raise HTTPException(400, "not a path: begin it with /")
        try:
            given = parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_PARAMETERS)
        except ValueError:
            raise HTTPException(400, f"more than {MOST_PARAMETERS} parameters") from None
        self.method = method
        self.headers = headers
        self.path = unquote(path)
        self.query_params = dict(given)
        """Of parameters that are given twice, the last."""
        self.path_params: dict[str, str] = {}
        """What the path has where its route has names in braces."""
        self._parts = parts

    async def body(self, most: int) -> bytes:
        """The body. Raises HTTPException (413) for one of more than `most` bytes."""
        body = bytearray()
        async with aclosing(self._parts) as parts:
            async for part in parts:
                body += part
                if len(body) > most:
                    raise HTTPException(413, f"the request is too long: send at most {most} bytes")
        return bytes(body)


class Exchange(Protocol):
    """What an answer is sent by: `start` once, `write` as often as there is something, and that was all."""

    request: Request

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head. Raises HungUp, as `write`."""

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits until the client takes it."""

    async def hung_up(self) -> None:
        """Return when the client has hung up."""


class Answer(Protocol):
    """What an endpoint returns."""

    async def send(self, exchange: Exchange) -> None:
        """Send it. Raises HungUp."""


class Response:
    """An answer that is there as a whole."""

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        *,
        media_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._body = body
        self._status = status
        self._headers = {"content-type": media_type, **(headers or {})}

    async def send(self, exchange: Exchange) -> None:
        """Send it. Raises HungUp."""
        length = {"content-length": str(len(self._body))}
        await exchange.start(self._status, self._headers | length)
        await exchange.write(self._body)


class JSONResponse(Response):
    """A value, as JSON."""

    def __init__(
        self, content: Any, status: int = 200, *, headers: Mapping[str, str] | None = None
    ) -> None:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        super().__init__(text.encode("utf-8", "backslashreplace"), status, headers=headers)
