# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The process of a store: it makes the system calls on files that may hang, so that the daemon can always end."""
