# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The configuration: what may stand in forebay.toml, and the part of it that clients of the daemon need."""
