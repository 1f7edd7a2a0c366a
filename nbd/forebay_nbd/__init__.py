"""NBD for Forebay: a protocol without I/O for both roles, a trio server and a trio client."""

from .client import Client
from .connection import Connection, Session
from .export import Export
from .limits import Limits
from .server import Server
from .wire import Buffer, ProtocolError, RequestError

__all__ = [
    "Buffer",
    "Client",
    "Connection",
    "Export",
    "Limits",
    "ProtocolError",
    "RequestError",
    "Server",
    "Session",
]
