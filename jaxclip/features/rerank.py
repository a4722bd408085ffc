"""The features of a candidate that a re-ranker can read: each is a function and one entry of FEATURES."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp

from jaxclip.features import geometry
from jaxclip.features.palette import PROTOTYPES

COLUMNS = ("crops", "texture", "colour_shares", "colour_names")
"""The columns of a prepared dataset that features are computed from: those of the main picture's first crop."""
COLOUR_NAMES = tuple(PROTOTYPES)
SHARPNESS = (0.5, 1.0, 2.0)
"""Inverse temperatures of the hubness columns, in units of the logit scale."""
CONTRAST = slice(10, 14)
"""Entries of a texture that are contrasts, in [0, 225] (squared grey levels); all others lie in [-1, 1]."""
ROWS_AT_ONCE = 4096

Values = Float[np.ndarray, "G S"]  # S numbers for each of G products
Present = Bool[np.ndarray, " G"]


@dataclass(frozen=True, eq=False)
class FeatureSources:
    """What the features of G products are computed from.

    Attributes:
      images: (G, D) float32 unit vectors of the main pictures.
      crops: (G, D) float32 unit vectors of their best crops.
      colour_names: (C, D) float32 unit vectors of COLOUR_NAMES as captions.
      columns: name in COLUMNS -> the G values of the prepared dataset.
      attributes: the attributes of each product, by the catalogue's column.
      bank: (M, D) float32 unit vectors of the query bank: captions that the towers were trained on.
      logit_scale: the factor by which the towers multiply cosines, exp of their parameter `logit_scale`.
      vocabulary: column of the catalogue -> the values that the re-ranker knows.
      in_captions: columns that the caption template names.
    """

    images: np.ndarray
    crops: np.ndarray
    colour_names: np.ndarray
    columns: Mapping[str, np.ndarray]
    attributes: Sequence[Mapping[str, str]]
    bank: np.ndarray
    logit_scale: float
    vocabulary: Mapping[str, Sequence[str]]
    in_captions: Sequence[str]


@dataclass(frozen=True)
class CandidateFeature:
    """A feature of a candidate.

    Attributes:
      compute: sources -> (values, present): an array with one row per product, and whether each product has the
        feature; where it does not, the re-ranker ignores the row.
      title: its name on the search page.
      meaning: its explanation for visitors of the search page.
    """

    compute: Callable[[FeatureSources], tuple[Values, Present]]
    title: str
    meaning: str


def compute(sources: FeatureSources) -> tuple[dict[str, Values], dict[str, Present]]:
    """Returns the values of every feature by name, and by name whether each product has the feature.

    S, the number of values per product, differs from feature to feature.
    """
    computed = {name: feature.compute(sources) for name, feature in FEATURES.items()}
    return (
        {name: np.asarray(values, np.float32) for name, (values, _) in computed.items()},
        {name: present for name, (_, present) in computed.items()},
    )


def hubness(images: Float[np.ndarray, "G D"], bank: Float[np.ndarray, "M D"], logit_scale: float) -> Values:
    """Returns (G, 3) float32, how similar each picture is to queries in general.

    It lets a re-ranker lower the scores of hubs, pictures that are similar to every query and outrank the answers. A
    column is log(mean over the query bank of exp(b * cosine)) / b, times the logit scale and minus its mean over the
    pictures, where b is 0.5, 1 or 2 times the logit scale. This is the normaliser of the inverted softmax (Smith et
    al. 2017) over a bank of training queries (Bogolin et al. 2022).

    Args:
      images: (G, D) unit vectors of the pictures.
      bank: (M, D) unit vectors of the query bank.
      logit_scale: the factor by which the towers multiply cosines.
    """
    columns = np.empty((len(images), len(SHARPNESS)), np.float32)
    for start in range(0, len(images), ROWS_AT_ONCE):
        cosines = images[start : start + ROWS_AT_ONCE] @ bank.T
        for number, factor in enumerate(SHARPNESS):
            sharp = factor * logit_scale
            columns[start : start + ROWS_AT_ONCE, number] = logsumexp(sharp * cosines, axis=1) - np.log(len(bank))
            columns[start : start + ROWS_AT_ONCE, number] /= sharp
    return logit_scale * (columns - columns.mean(axis=0))


def _always(sources: FeatureSources) -> Present:
    return np.ones(len(sources.images), bool)


def _was_cropped(sources: FeatureSources) -> Present:
    """Returns whether each product's crop is only a part of the picture; a crop of the whole adds no information."""
    return _geometry(sources)[:, 2] < 1.0


def _geometry(sources: FeatureSources) -> Values:
    return geometry.box_geometry(sources.columns["crops"])


def _colours(sources: FeatureSources) -> Values:
    from jaxclip.features import colour_match  # imports scikit-image, which the configuration need not load

    return colour_match.soft_colours(sources.columns["colour_names"].tolist(), sources.columns["colour_shares"])


def _dominant_colour(sources: FeatureSources) -> Values:
    return sources.colour_names[[COLOUR_NAMES.index(name) for name in sources.columns["colour_names"][:, 0]]]


def _texture(sources: FeatureSources) -> Values:
    texture = np.array(sources.columns["texture"])
    texture[:, CONTRAST] = np.sqrt(texture[:, CONTRAST]) / 15
    return texture


def _attributes(sources: FeatureSources, *, mentioned: bool) -> tuple[Values, Present]:
    """Returns each product's values, multi-hot, and whether it has any.

    The columns are those of the vocabulary that captions mention, or all others; values outside it do not count.
    """
    columns = [column for column in sources.vocabulary if (column in sources.in_captions) == mentioned]
    places = {
        pair: place for place, pair in enumerate((column, v) for column in columns for v in sources.vocabulary[column])
    }
    hot = np.zeros((len(sources.attributes), max(1, len(places))), np.float32)
    for row, attributes in enumerate(sources.attributes):
        hot[row, [places[pair] for pair in attributes.items() if pair in places]] = 1.0
    return hot, hot.any(axis=1)


FEATURES: dict[str, CandidateFeature] = {
    "hubness": CandidateFeature(
        lambda sources: (hubness(sources.images, sources.bank, sources.logit_scale), _always(sources)),
        "Generality",
        "Lowers pictures that are close to almost every query",
    ),
    "image": CandidateFeature(
        lambda sources: (sources.images, _always(sources)), "Picture", "The whole picture compared with the words"
    ),
    "crop": CandidateFeature(
        lambda sources: (sources.crops, _was_cropped(sources)),
        "Crop",
        "The crop of the product compared with the words",
    ),
    "colour": CandidateFeature(
        lambda sources: (_colours(sources), _always(sources)), "Colours", "The names of the colours in the crop"
    ),
    "colour_embedding": CandidateFeature(
        lambda sources: (_dominant_colour(sources), _always(sources)),
        "Main colour",
        "The name of the crop's main colour compared with the words",
    ),
    "geometry": CandidateFeature(
        lambda sources: (_geometry(sources), _was_cropped(sources)),
        "Proportions",
        "Size and shape of the crop box",
    ),
    "texture": CandidateFeature(
        lambda sources: (_texture(sources), _always(sources)), "Texture", "How patterned the crop is"
    ),
    "attributes": CandidateFeature(
        lambda sources: _attributes(sources, mentioned=False),
        "Attributes",
        "The catalogue's attributes of the product that captions do not mention",
    ),
    # Queries are captions, so this feature lets a re-ranker look up the words that a query was made from: a test with
    # it says little about pictures.
    "caption_attributes": CandidateFeature(
        lambda sources: _attributes(sources, mentioned=True),
        "Attributes in names",
        "The catalogue's attributes of the product that captions mention",
    ),
}
"""Name in `rerank.features` -> the feature. A new feature is a new entry here; `rerank.features` selects from them."""
