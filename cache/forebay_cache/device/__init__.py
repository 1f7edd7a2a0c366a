"""The cache device: layout, reads and writes, and making them durable."""
