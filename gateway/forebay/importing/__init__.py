# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay import`: a file of whatever format, from here or the web, becomes a raw image in a store."""
