# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The images that this host knows, as things of their own: listed, warmed, tagged, pinned and purged without a disk."""
