# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Looking after a cache in use: scrub, a device that comes back, growth."""
