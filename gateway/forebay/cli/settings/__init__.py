# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The commands on settings: those of disks, and those of the daemon."""
