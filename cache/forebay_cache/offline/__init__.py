"""A cache that nobody serves from: recovery at start, check and repair."""
