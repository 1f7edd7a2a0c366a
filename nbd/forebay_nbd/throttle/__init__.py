# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Requests that have to wait because their export has had enough of them for now: left where they were received."""
