# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Staging, in the daemon: pieces of an image that came from other hosts, checked before they are clean data."""
