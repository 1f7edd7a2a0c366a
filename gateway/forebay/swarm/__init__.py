# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""`forebay stager`: the process that gives pieces of images to other hosts and gets them from there."""
