"""What makes changes durable: the intent journal and the commit."""
