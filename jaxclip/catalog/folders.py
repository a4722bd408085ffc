"""Where what may be kept between runs is kept."""

import os
from pathlib import Path


def cache() -> Path:
    """Returns the folder of drawn catalogues, prepared datasets and compiled programs: $JAXCLIP_CACHE.

    It is ~/.cache/jaxclip where that is not set.
    """
    return Path(os.environ.get("JAXCLIP_CACHE") or Path.home() / ".cache" / "jaxclip").expanduser()
