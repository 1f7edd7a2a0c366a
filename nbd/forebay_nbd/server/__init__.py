# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The NBD server: exports, connections, and the bounds that hostile clients meet."""
