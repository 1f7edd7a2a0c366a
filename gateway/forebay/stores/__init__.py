# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Store sockets: the images of a store over NBD, each attached while somebody reads it, for QEMU's overlays."""
