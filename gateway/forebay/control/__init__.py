"""The control API: HTTP and JSON on a Unix socket, and Prometheus text."""
