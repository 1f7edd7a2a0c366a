# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What lies beside an image, in IMAGE.forebay/: the owner marker, locks, and the redo journal."""
