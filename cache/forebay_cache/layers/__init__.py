# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Layers: maps from the blocks of an image or disk to slots."""
