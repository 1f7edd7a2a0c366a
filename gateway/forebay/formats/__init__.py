# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The formats of image files, as far as their headers go. Nothing here touches storage."""
