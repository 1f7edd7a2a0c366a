# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""NBD for Forebay: the protocol without I/O for both roles, a server and a client for trio."""

from forebay_nbd.client.client import Client
from forebay_nbd.client.connecting import open_export
from forebay_nbd.client.negotiation import Negotiated
from forebay_nbd.protocol.session import Session
from forebay_nbd.protocol.wire import Buffer, ProtocolError, RequestError
from forebay_nbd.server.budget import Budget, Budgets
from forebay_nbd.server.connection import Connection
from forebay_nbd.server.export import Export, Exports, KnownExports, Refused, Timing
from forebay_nbd.server.limits import Limits
from forebay_nbd.server.phase import Phase
from forebay_nbd.server.places import Process
from forebay_nbd.server.server import Server

__all__ = [
    "Budget",
    "Budgets",
    "Buffer",
    "Client",
    "Connection",
    "Export",
    "Exports",
    "KnownExports",
    "Limits",
    "Negotiated",
    "Phase",
    "Process",
    "ProtocolError",
    "Refused",
    "RequestError",
    "Server",
    "Session",
    "Timing",
    "open_export",
]
