# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The control API: HTTP and JSON on a Unix socket, and Prometheus text."""
