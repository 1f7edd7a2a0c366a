# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay doctor`: what is wrong with this host and its daemon, or may come to be, each with what to do."""
