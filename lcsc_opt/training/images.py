"""The drawn characters under the name by which studies of version 0.2.0 import them.

The worked example ``studies/any_weights/characters.py`` does. A stored study holds the digest of that file, so an edit
would refuse to continue it.
"""

from lcsc_opt.metrics.bundled_images import drawn_characters

__all__ = ["drawn_characters"]
