# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the daemon knows of itself: how much memory it may take, and how long its loop was kept waiting."""
