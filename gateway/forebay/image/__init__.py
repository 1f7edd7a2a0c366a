# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""An image on this host: its origin, whether it can be reached, and the clean blocks its disks share."""
