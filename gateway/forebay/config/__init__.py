"""The configuration: what may stand in forebay.toml, and the part of it that clients of the daemon need."""
