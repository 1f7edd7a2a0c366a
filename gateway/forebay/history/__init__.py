# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The last 24 hours of this host and of its disks, in steps, for charts: what `GET /history` tells."""
