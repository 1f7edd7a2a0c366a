"""The NBD server: exports, connections, and the bounds that hostile clients meet."""
