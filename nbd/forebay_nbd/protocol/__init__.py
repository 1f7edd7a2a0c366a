"""The NBD protocol without I/O: numbers and layouts, messages, and the parsers of both roles."""
