"""Where misses are read and written: files in stores, block devices and NBD exports, off the event loop."""
