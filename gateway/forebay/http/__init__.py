# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""HTTP/1.1 for the daemon's own sockets: messages, routes, and connections by h11 on trio."""
