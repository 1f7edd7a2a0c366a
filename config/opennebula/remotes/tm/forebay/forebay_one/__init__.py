# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""OpenNebula's drivers for Forebay: Python from 3.9 on, nothing but its standard library."""
