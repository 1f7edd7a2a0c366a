# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What libvirt sees: the <disk> element, and the hook that follows its domains."""
