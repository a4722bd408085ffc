"""The table of incorrect pairs, a separate file in the dataset's folder, so that mining does not rewrite pictures."""

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

_FORMAT = 1

# The exceptions that zipfile and NumPy raise on damaged files.
_DAMAGED = (
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
    """A partner for each product; an incorrect pair is a product's image with its partner's text.

    Attributes:
      partner: (N,) index of the product whose text is used; `NONE` for a product that is left out.
      similarity: (N,) cosine of the two images, S in equations 1 and 2 of the paper that `incorrect_pairs` cites; NaN
        for a product that is left out.
      image_clusters: (N,) k-means cluster of each image; None if the variant uses no clusters.
      text_clusters: (N,) k-means cluster of each text; None if the variant uses no clusters.
      fingerprint: hash of the features and groups from which the pairs were mined.
    """

    partner: Int64[np.ndarray, "N"]
    similarity: Float32[np.ndarray, "N"]
    image_clusters: Int64[np.ndarray, "N"] | None
    text_clusters: Int64[np.ndarray, "N"] | None
    fingerprint: str

    @property
    def products(self) -> Int64[np.ndarray, "M"]:
        """Indices of the products that have a partner, in ascending order."""
        return np.flatnonzero(self.partner != NONE)

    @property
    def uses(self) -> Int64[np.ndarray, "N"]:
        """Number of times that each product is a partner."""
        return np.bincount(self.partner[self.products], minlength=len(self.partner))

    def summary(self) -> dict[str, float]:
        """Returns statistics of the pairs: their number, the uses of partners, and the image similarities."""
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
    """Returns a hash of all values and shapes, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for array, dtype in ((image_features, "<f4"), (text_features, "<f4"), (groups, "<i8")):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype).data)
    return digest.hexdigest()


def save(path: Path, pairs: MinedPairs, settings: Mapping[str, object]) -> None:
    """Writes pairs and their settings to one file atomically; equal contents give equal bytes.

    Args:
      path: the .npz file, in an existing folder.
      pairs: the pairs that `mine` returned.
      settings: JSON values: variant, clusters, seed, and the source of the features and of the split.
    """
    arrays = {"partner": pairs.partner, "similarity": pairs.similarity}
    if pairs.image_clusters is not None and pairs.text_clusters is not None:
        arrays |= {"image_clusters": pairs.image_clusters, "text_clusters": pairs.text_clusters}
    # The column names are stored as well, because no checksum in the file covers them.
    metadata = {
        "form": _FORMAT,
        "columns": sorted(arrays),
        "fingerprint": pairs.fingerprint,
        "settings": dict(settings),
    }
    with files.atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(metadata, sort_keys=True)), **arrays)


def load(path: Path) -> tuple[MinedPairs, dict[str, object]]:
    """Returns the pairs and the settings that `save` wrote.

    Raises:
      UserError: the file is missing, truncated or damaged, or has another format.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        metadata = json.loads(str(content["about"]))
        if metadata["form"] != _FORMAT:
            raise ValueError(f"the table's format is {metadata['form']}, not {_FORMAT}")
        if sorted(content) != sorted(["about", *metadata["columns"]]):
            raise ValueError(f"the table's columns are {sorted(content)}")
        pairs = MinedPairs(
            content["partner"],
            content["similarity"],
            content.get("image_clusters"),
            content.get("text_clusters"),
            metadata["fingerprint"],
        )
        _check(pairs)
        return pairs, metadata["settings"]
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: process 0 writes the incorrect pairs there, so all processes must share that folder"
        ) from None
    except _DAMAGED as error:
        raise UserError(
            f"{path} is not a complete table of incorrect pairs ({error}): delete the file, and the next training "
            "mines the pairs again"
        ) from None


def _check(pairs: MinedPairs) -> None:
    total = len(pairs.partner)
    columns = (pairs.similarity, pairs.image_clusters, pairs.text_clusters)
    if any(column is not None and column.shape != (total,) for column in columns):
        raise ValueError("the table's columns differ in length")
    if (pairs.partner < NONE).any() or (pairs.partner >= total).any():
        raise ValueError("the table has partners that are not among its products")
