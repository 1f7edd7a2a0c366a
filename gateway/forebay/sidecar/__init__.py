"""What lies beside an image, in IMAGE.forebay/: the owner marker, locks, and the redo journal."""
