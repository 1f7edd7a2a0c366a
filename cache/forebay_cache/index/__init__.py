# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The index: LMDB tables that say what lies in which slot, and the checksums of slots."""
