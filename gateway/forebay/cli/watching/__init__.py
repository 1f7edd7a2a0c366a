# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay top` and `forebay page`: what a host does, as it goes on."""
