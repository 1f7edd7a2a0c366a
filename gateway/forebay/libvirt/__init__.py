"""What libvirt sees: the <disk> element, and the hook that follows its domains."""
