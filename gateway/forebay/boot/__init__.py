# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Boot traces: what guests read in the first minutes of a disk, kept with the image, and fetched ahead next time."""
