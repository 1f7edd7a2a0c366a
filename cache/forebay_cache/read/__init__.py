"""Reading: views over layers, and fills from the origin."""
