"""The daemon: which disks there are, how they come and go, and the process around them."""
