"""Units, words and records as they are stored."""
