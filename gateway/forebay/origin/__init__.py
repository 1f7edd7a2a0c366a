# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where misses are read and written: files in stores, block devices and NBD exports, off the event loop."""
