# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The NBD protocol without I/O: numbers and layouts, messages, and the parsers of both roles."""
