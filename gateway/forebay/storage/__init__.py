# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The cache's storage: files, devices and logical volumes, made, enlarged, checked and given back."""
