# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How clients reach a disk: its NBD socket, who may connect, a planned restart, and the FUSE mount."""
