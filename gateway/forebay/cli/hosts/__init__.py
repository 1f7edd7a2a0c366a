# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay summary` and `forebay hosts`: how one host stands, and how many do, asked by ssh."""
