# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What happens to blocks of a layer: clean, private, frozen, settled."""
