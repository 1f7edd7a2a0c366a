# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Overlays that stay: kept beyond detach, with snapshots, saved, committed and reverted."""
