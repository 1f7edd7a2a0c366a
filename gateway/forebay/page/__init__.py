# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay page`: how this host stands, as a page in a browser. A client of the daemon, which changes nothing."""
