"""Disks as files: a FUSE mount, in a process of its own, that is an NBD client of the daemon."""
