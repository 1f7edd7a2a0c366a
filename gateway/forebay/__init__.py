# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Forebay: VM disk images on shared storage, served to local VMs through a persistent cache."""

__version__ = "0.1.0"
