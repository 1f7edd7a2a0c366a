"""What happens to blocks of a layer: clean, private, frozen, settled."""
