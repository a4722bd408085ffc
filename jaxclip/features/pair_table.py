"""The table of incorrect pairs: a file of its own in the dataset's folder, so that mining does not rewrite pictures."""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32, Int64

from jaxclip.errors import UserError
from jaxclip.runtime import files

NONE = -1
"""Partner index of a product that is left out."""

_FORM = 1

# The exceptions that zipfile and NumPy raise on damaged files.
_BROKEN = (
    BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


@dataclass(frozen=True)
class MinedPairs:
    """A partner for each product: the incorrect pair is the product's image with the partner's text.

    Attributes:
      partner: (N,) index of the product that lends its text, `NONE` for a product that is left out.
      similarity: (N,) cosine of the two images, S of the paper's Eqs. 1 and 2; NaN for a product that is left out.
      image_clusters: (N,) k-means cluster of each image, None where the variant needs none.
      text_clusters: (N,) k-means cluster of each text, None where the variant needs none.
      fingerprint: hash of the features and groups from which the pairs were mined.
    """

    partner: Int64[np.ndarray, "N"]
    similarity: Float32[np.ndarray, "N"]
    image_clusters: Int64[np.ndarray, "N"] | None
    text_clusters: Int64[np.ndarray, "N"] | None
    fingerprint: str

    @property
    def products(self) -> Int64[np.ndarray, "M"]:
        """The products that have a partner, in order."""
        return np.flatnonzero(self.partner != NONE)

    @property
    def uses(self) -> Int64[np.ndarray, "N"]:
        """How often each product is a partner."""
        return np.bincount(self.partner[self.products], minlength=len(self.partner))

    def summary(self) -> dict[str, float]:
        """Returns statistics of the pairs: their number, how evenly partners are used, and the image similarities."""
        uses, similarity = self.uses, self.similarity[self.products]
        return {
            "pairs": len(similarity),
            "left_out": len(self.partner) - len(similarity),
            "uses_max": int(uses.max()),
            "uses_std": float(uses.std()),
            "never_used": int((uses == 0).sum()),
            "similarity_mean": float(similarity.mean(dtype=np.float64)),
            "similarity_max": float(similarity.max()),
        }


def fingerprint(image_features: np.ndarray, text_features: np.ndarray, groups: np.ndarray) -> str:
    """Returns 32 hexadecimal digits that depend on every value, on the shapes and on the order of the arguments."""
    digest = hashlib.blake2b(digest_size=16)
    for array, kind in ((image_features, "<f4"), (text_features, "<f4"), (groups, "<i8")):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array, kind).data)
    return digest.hexdigest()


def save(path: Path, pairs: MinedPairs, settings: Mapping[str, object]) -> None:
    """Writes pairs and their settings to one file, atomically; the same content gives the same bytes.

    Args:
      path: the .npz file, in an existing folder.
      pairs: as `mine` returned them.
      settings: JSON values: variant, clusters, seed, and the origin of the features and the split.
    """
    arrays = {"partner": pairs.partner, "similarity": pairs.similarity}
    if pairs.image_clusters is not None and pairs.text_clusters is not None:
        arrays |= {"image_clusters": pairs.image_clusters, "text_clusters": pairs.text_clusters}
    # The column names are stored as well, because no checksum in the file covers them.
    about = {"form": _FORM, "columns": sorted(arrays), "fingerprint": pairs.fingerprint, "settings": dict(settings)}
    with files.atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about, sort_keys=True)), **arrays)


def load(path: Path) -> tuple[MinedPairs, dict[str, object]]:
    """Returns the pairs and the settings that `save` wrote.

    Raises:
      UserError: there is no such file, or it is truncated, damaged, or has another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        about = json.loads(str(content["about"]))
        if about["form"] != _FORM:
            raise ValueError(f"its form is {about['form']}, not {_FORM}")
        if sorted(content) != sorted(["about", *about["columns"]]):
            raise ValueError(f"it has columns {sorted(content)}")
        pairs = MinedPairs(
            content["partner"],
            content["similarity"],
            content.get("image_clusters"),
            content.get("text_clusters"),
            about["fingerprint"],
        )
        _check(pairs)
        return pairs, about["settings"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: mine the incorrect pairs first") from None
    except _BROKEN as error:
        raise UserError(f"{path} is not a whole table of incorrect pairs ({error}): mine them again") from None


def _check(pairs: MinedPairs) -> None:
    total = len(pairs.partner)
    columns = [one for one in (pairs.similarity, pairs.image_clusters, pairs.text_clusters) if one is not None]
    if any(column.shape != (total,) for column in columns):
        raise ValueError("its columns differ in length")
    if (pairs.partner < NONE).any() or (pairs.partner >= total).any():
        raise ValueError("it names partners that are not in it")
