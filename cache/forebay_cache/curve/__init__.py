# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How often a cache of another size would have what is asked for: from a sample of what is asked for."""
