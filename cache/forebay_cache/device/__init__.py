# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The cache device: layout, reads and writes, and making them durable."""
