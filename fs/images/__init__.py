"""Images: a body as one local file that equals it byte for byte, for bodies that are larger than about 1 MiB.

- `ImageStore`: the images of a mount, shared through one directory with the other mounts of the node.
- `Image`: one that is open; what of it is there, verified, on its way.
- `body_key`, `is_large`: what it is called, and which bodies have one.

Smaller bodies are in the block cache (`fs/cache.py`). Both have one bound (`fs/room.py`).
"""

from apollofs.fs.images.image import Image
from apollofs.fs.images.naming import IMAGE_BYTES_MIN, body_key, is_large
from apollofs.fs.images.scrub import Scrub
from apollofs.fs.images.store import ImageStore

__all__ = ["IMAGE_BYTES_MIN", "Image", "ImageStore", "Scrub", "body_key", "is_large"]
