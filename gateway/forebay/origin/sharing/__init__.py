# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which call is next where more wait for a store than it is given at a time: the weights of disks say."""
