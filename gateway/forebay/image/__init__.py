"""An image on this host: its origin, whether it can be reached, and the clean blocks its disks share."""
