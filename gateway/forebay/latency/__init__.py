# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How long requests take, and what they wait for: see "latency" in gateway/README.md."""
