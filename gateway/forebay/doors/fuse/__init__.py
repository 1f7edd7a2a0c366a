# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Disks as files: a FUSE mount, in a process of its own, that is an NBD client of the daemon."""
