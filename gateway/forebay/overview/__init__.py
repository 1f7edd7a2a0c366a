# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How this host stands, in one answer: what `forebay summary` asks for, and `forebay hosts` of many hosts."""
