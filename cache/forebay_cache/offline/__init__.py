# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache that nobody serves from: recovery at start, check and repair."""
