# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Moving an overlay to another host with what it has: through files beside its image."""
