# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Images in the formats of virtual machines: looked at by us, served by QEMU's storage daemon, seen as a file."""
