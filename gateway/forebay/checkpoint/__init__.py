# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Write-back: dirty data, frozen at one instant and written to the image through the redo journal."""
