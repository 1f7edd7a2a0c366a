"""Which slots are free, which are to be evicted."""
