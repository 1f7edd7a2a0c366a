"""NBD for Forebay: a protocol without I/O for both roles, a trio server and a trio client."""

from forebay_nbd.client.client import Client
from forebay_nbd.protocol.wire import Buffer, ProtocolError, RequestError
from forebay_nbd.server.connection import Connection, Session
from forebay_nbd.server.export import Export
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.server import Server

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
