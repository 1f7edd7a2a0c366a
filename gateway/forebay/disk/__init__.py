# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One disk as its VM sees it: an NBD export over the layers of the cache, with its mode."""
