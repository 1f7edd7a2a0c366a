"""Looking after a cache in use: scrub, a device that comes back, growth."""
