# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What has happened to disks: told where it happens, kept over restarts, in the journal with fields of its own."""
