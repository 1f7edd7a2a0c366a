# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How fast a disk may be used: requests and bytes per second, with bursts."""
