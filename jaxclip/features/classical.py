"""Picture and text features that are computed without a trained model, for mining incorrect pairs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from jaxclip.catalog.captions import normalise
from jaxclip.errors import UserError

_MAX_TERMS = 50_000  # number of words and word pairs; bounds the memory that long descriptions take
_MIN_LENGTH = 1e-4  # rows shorter than this (typical length: 1) are rounding errors without a meaningful direction
_MAX_SPREADS = 5.0  # textures are clipped at this many interquartile ranges from the median


def image_features(
    colour_histograms: Float[np.ndarray, "N C"],
    textures: Float[np.ndarray, "N T"],
    *,
    colour_weight: float = 0.5,
    dimensions: int | None = None,
) -> Float32[np.ndarray, "N D"]:
    """Returns (N, D) unit rows whose cosine measures the similarity of two pictures in colour and texture.

    Histograms are normalised to sum to 1, and their square roots are taken (Hellinger: the dot product is then the
    Bhattacharyya coefficient), so that a large plain background does not dominate the garment. Texture columns have
    different units: each is divided by its interquartile range, which is robust to outliers, and clipped at 5 such
    ranges from its median; a column whose interquartile range is 0 is divided by its standard deviation instead. Both
    blocks are then centred, so that dissimilar pictures have negative cosines, and scaled to the same mean square
    length before they are weighted and concatenated.

    Args:
      colour_histograms: non-negative counts or shares of C colours for N pictures; a row may be empty (all 0).
      textures: T measures of each picture, in any unit; T may be 0.
      colour_weight: share of colour in the squared length of a row, on average, from 0 to 1.
      dimensions: D, the number of principal components. If it is None, or not less than N or C + T, the C + T
        columns are kept.

    Returns:
      Unit rows; a row of zeros for a product whose features all equal the mean.

    Raises:
      ValueError: the shapes do not match, a value is not finite, a count is negative, or the weight is not in [0, 1].
    """
    shapes = colour_histograms.shape, textures.shape
    if [len(shape) for shape in shapes] != [2, 2] or len(colour_histograms) != len(textures):
        raise ValueError(f"expected histograms (N, C) and textures (N, T), got {shapes}")
    if not (np.isfinite(colour_histograms).all() and np.isfinite(textures).all()) or (colour_histograms < 0).any():
        raise ValueError("histograms must be finite and not negative, textures must be finite")
    if not 0 <= colour_weight <= 1:
        raise ValueError(f"expected a colour weight from 0 to 1, got {colour_weight}")
    blocks = (_hellinger(colour_histograms), colour_weight), (_standardise(textures), 1 - colour_weight)
    features = np.concatenate([_normalise_block(block) * np.float32(weight**0.5) for block, weight in blocks], axis=1)
    if dimensions is not None and dimensions < min(features.shape):
        with np.errstate(invalid="ignore"):  # the unused share of explained variance is 0 / 0 if all rows are equal
            features = PCA(dimensions, svd_solver="covariance_eigh").fit_transform(features)
    return _unit_rows(features)


def text_features(captions: Sequence[str], dimensions: int = 128, seed: int = 0) -> Float32[np.ndarray, "N E"]:
    """Returns (N, E) unit rows whose cosine measures the similarity of the words in two captions (LSA).

    The 50,000 most frequent words and pairs of neighbouring words of the normalised captions are weighted by
    (1 + log tf) idf and reduced by a truncated singular value decomposition with fixed signs (Deerwester et al. 1990,
    "Indexing by latent semantic analysis").

    Args:
      captions: N captions, in any script that separates words.
      dimensions: E. It is smaller if there are fewer captions or fewer terms; with fewer terms, their weights are the
        features.
      seed: seed of the randomised decomposition.

    Returns:
      Unit rows; a row of zeros for a caption without words, or whose words have no weight in any dimension.

    Raises:
      UserError: no caption contains a word.
    """
    terms = TfidfVectorizer(
        preprocessor=normalise,
        token_pattern=r"\w+",
        ngram_range=(1, 2),
        sublinear_tf=True,
        max_features=_MAX_TERMS,
        dtype=np.float32,
    )
    try:
        weights = terms.fit_transform(captions)
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        raise UserError(
            f"none of the {len(captions):,} captions contains a word, so texts cannot be compared: give a catalogue "
            "with captions, or set data.caption_template to add attributes to captions"
        ) from None
    if weights.shape[1] <= dimensions:
        return weights.toarray()
    with np.errstate(invalid="ignore"):  # the same 0 / 0 as in `image_features`
        rank = min(dimensions, weights.shape[0])
        reduced = TruncatedSVD(rank, n_iter=7, random_state=seed).fit_transform(weights)
    return _unit_rows(reduced)


def _hellinger(histograms: Float[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
    histograms = np.asarray(histograms, np.float32)
    sums = histograms.sum(axis=1, keepdims=True)
    return np.sqrt(np.divide(histograms, sums, out=np.zeros_like(histograms), where=sums > 0))


def _standardise(textures: Float[np.ndarray, "N T"]) -> Float32[np.ndarray, "N T"]:
    textures = np.asarray(textures, np.float32)
    low, median, high = np.percentile(textures, [25, 50, 75], axis=0) if textures.size else np.zeros((3, 1))
    spread = np.where(high > low, high - low, textures.std(axis=0) if textures.size else 0)
    centred = textures - median.astype(np.float32)
    spread = spread.astype(np.float32)
    with np.errstate(over="ignore"):  # overflowing values are clipped
        scaled = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return np.clip(scaled, -_MAX_SPREADS, _MAX_SPREADS)


def _normalise_block(block: Float32[np.ndarray, "N B"]) -> Float32[np.ndarray, "N B"]:
    """Returns the block shifted and scaled: each column has mean 0, and the mean square length of the rows is 1.

    If all rows are equal, up to rounding, it returns zeros.
    """
    if not block.size:
        return block
    centred = block - block.mean(axis=0, dtype=np.float64).astype(np.float32)
    length = np.sqrt(np.square(centred).sum(axis=1).mean())
    return centred / length if length > _MIN_LENGTH else np.zeros_like(centred)


def _unit_rows(features: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, "N D"]:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, out=np.zeros(features.shape, np.float32), where=lengths > _MIN_LENGTH)
