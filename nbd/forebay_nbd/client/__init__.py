"""The NBD client: one connection, many requests in flight."""
