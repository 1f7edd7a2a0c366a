"""The names of layers of the cache, and of what they belong to."""

from forebay_cache import Layer


def clean_name(key: str) -> str:
    """The name of the layer that has the clean blocks of the image with that key."""
    return f"image:{key}"


def layer_prefix(disk: str) -> str:
    """How the names of a disk's private layers begin. After it: a number, a colon, the key of the image."""
    return f"disk:{disk}:"


def image_of(layer: Layer) -> str | None:
    """The key of the image whose disk the private layer belongs to; None where an older version made it."""
    parts = layer.name.split(":", 3)
    return parts[3] if len(parts) > 3 else None
