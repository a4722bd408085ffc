"""Mines incorrect pairs: for each product, a dissimilar product whose text is paired with its image as a mismatch.

Tagami et al., "Automatic Data Generation of Incorrect Image-Text Pairs for Effective Contrastive Learning of CLIP
Model", section 3.2 (the rule) and section 4.1 (the variants it is compared with). Variants:

  random          any product of another group (their method 3);
  below:T         any product of another group whose image has a cosine below T with the product's own (4 to 6, with
                  T = 0.8 and 0.2);
  clustered       the paper's: image and text features are clustered by k-means. A product is sent to another image
                  cluster at random and takes the text of the least similar image there whose text is not in its
                  own text cluster.

Taken literally, the last rule makes a few outliers the partner of almost every product, and most texts never appear
in an incorrect pair. Here every product is a partner equally often, as far as the rule's conditions allow:

  1. The other image cluster is drawn at random. Its probabilities are not equal: every cluster is drawn in proportion
     to its size. Of all plans with this property the one of largest entropy is used, found by Sinkhorn scaling over
     the cells (image cluster, text cluster).
  2. The products sent to a cluster and the cluster's members are split at random into blocks of at most 512. In each
     block every product gets a partner of its own such that the sum of similarities is minimal (an assignment
     problem, solved exactly). So a partner is dissimilar, but not always the least similar product of all.
  3. The remaining products, whose block had no admissible partner for them, are placed one by one: each takes the
     least used admissible partner in any other image cluster, and among equally used ones the least similar.

For `random` and `below:T`, one cluster holds all products, and random numbers replace the similarities. No product
is used more than 1 + (N - 1) // A times, where A is the smallest number of admissible partners of any paired product.
A product without any admissible partner is left out and counted. Only the features and one block of pairs are held
in memory, never all pairs.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64
from scipy.optimize import linear_sum_assignment
from sklearn import preprocessing
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from jaxclip.errors import UserError
from jaxclip.features.pair_table import NONE, MinedPairs, fingerprint

CLUSTERS = 10
_BLOCK = 512  # products on each side of an assignment problem, whose time grows with their third power
_ENTRIES = 1 << 22  # pairs held in memory at once when all products are candidates
_FORBIDDEN = 4.0 * _BLOCK  # more than avoiding a forbidden pair can cost in a block, where pairs cost at most 1
_SINKHORN = 30  # rounds; without an even plan the scales grow up to N-fold per round, so more rounds could overflow

Progress = Callable[..., Iterable]


def mine(
    image_features: Float32[np.ndarray, "N D"],
    text_features: Float32[np.ndarray, "N E"],
    groups: Int64[np.ndarray, "N"],
    *,
    variant: str = "clustered",
    clusters: int = CLUSTERS,
    seed: int = 0,
    progress: Progress = lambda iterable, **_: iterable,
) -> MinedPairs:
    """Returns a partner for each product, by the rules in the module's docstring.

    A partner is never in the product's own group and, with `clustered`, never in its image or text cluster. Pass the
    products of one split only: any of them may become a partner. The result depends on the arguments only, not on the
    number of cores.

    Args:
      image_features: one row per product, of any norm; a row of zeros has cosine 0 with every other.
      text_features: one row per product; used by `clustered` only.
      groups: group of each product; products of one group are interchangeable for retrieval.
      variant: "random", "below:T" with -1 < T <= 1, or "clustered".
      clusters: number of image clusters, and of text clusters; fewer are formed if there are fewer distinct features.
      seed: seed of the clustering and of every random draw.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.

    Raises:
      UserError: the variant is unknown, there are fewer products than clusters, or no product has a partner.
      ValueError: shapes do not agree, or a feature is not finite.
    """
    below = threshold(variant)
    _check(image_features, text_features, groups)
    total = len(groups)
    if variant == "clustered" and not 2 <= clusters <= total:
        raise UserError(
            f"{clusters} clusters of {total} products: give at least 2 clusters and at most one per product"
        )
    if total < 2:
        raise UserError(f"{total} products make no incorrect pair: give at least 2")
    images = preprocessing.normalize(np.asarray(image_features, np.float32))
    random = np.random.default_rng(seed)
    # The order of sums depends on the number of threads, and can move a product to another cluster.
    with threadpool_limits(1):
        if variant == "clustered":
            image_clusters = _cluster(images, clusters, seed)
            text_clusters = _cluster(preprocessing.normalize(np.asarray(text_features, np.float32)), clusters, seed)
            pool, target = image_clusters, _draw_targets(image_clusters, text_clusters, random)
        else:
            image_clusters = text_clusters = None
            pool = target = np.zeros(total, np.int64)
        rule = _Rule(images, groups, image_clusters, text_clusters, below)
        matched = _match(rule, target, pool, random, progress)
        partner, similarity = _place_rest(rule, *matched, random, progress)
    if (partner == NONE).all():
        reason = _reason(variant, image_clusters, text_clusters)
        raise UserError(f"no product has an incorrect pair by the rule {variant!r}: {reason}")
    of_features = fingerprint(image_features, text_features, groups)
    return MinedPairs(partner, similarity, image_clusters, text_clusters, of_features)


@dataclass(frozen=True)
class _Rule:
    """Decides which products may be partners, and how similar they are, for one block of pairs at a time."""

    images: Float32[np.ndarray, "N D"]  # unit rows
    groups: Int64[np.ndarray, "N"]
    image_clusters: Int64[np.ndarray, "N"] | None
    text_clusters: Int64[np.ndarray, "N"] | None
    threshold: float

    def block(
        self, products: Int64[np.ndarray, "R"], candidates: Int64[np.ndarray, "C"], random: np.random.Generator
    ) -> tuple[Float32[np.ndarray, "R C"], Float32[np.ndarray, "R C"], Bool[np.ndarray, "R C"]]:
        """Returns (similarity, cost, forbidden) of each pair; costs are from -1 to 1; lower is better."""
        similarity = np.clip(self.images[products] @ self.images[candidates].T, -1, 1)
        forbidden = self.groups[products, None] == self.groups[candidates]
        for labels in (self.image_clusters, self.text_clusters):
            if labels is not None:
                forbidden |= labels[products, None] == labels[candidates]
        if not math.isinf(self.threshold):
            forbidden |= similarity >= self.threshold
        at_random = self.image_clusters is None
        return similarity, random.random(similarity.shape, np.float32) if at_random else similarity, forbidden


def threshold(variant: str) -> float:
    """Returns the limit of a variant's cosines, infinity without one; UserError if the variant is unknown."""
    if variant in ("random", "clustered"):
        return math.inf
    name, _, number = variant.partition(":")
    try:
        below = float(number) if name == "below" else math.nan
    except ValueError:
        below = math.nan
    if not -1 < below <= 1:
        raise UserError(
            f"unknown variant {variant!r} of incorrect pairs: it should be random, clustered, or below:T with a cosine "
            "T above -1 and at most 1, as in below:0.2"
        )
    return below


def _check(image_features: np.ndarray, text_features: np.ndarray, groups: np.ndarray) -> None:
    shapes = image_features.shape, text_features.shape, groups.shape
    if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"features (N, D) and (N, E) and groups (N,) expected, got {shapes}")
    for name, features in (("image", image_features), ("text", text_features)):
        if not np.isfinite(features).all():
            raise ValueError(f"the {name} features of {(~np.isfinite(features).all(axis=1)).sum()} rows are not finite")


def _reason(variant: str, image_clusters: np.ndarray | None, text_clusters: np.ndarray | None) -> str:
    for labels, what in ((image_clusters, "image"), (text_clusters, "text")):
        if labels is not None and (labels == labels[0]).all():
            return f"all {what} features fall into one cluster"
    if variant == "clustered":
        return "all products of other image clusters are in the same text cluster or group"
    return "all products are in one group" + (
        ", or their images are at least that similar" if variant != "random" else ""
    )


def _cluster(unit: Float32[np.ndarray, "N D"], clusters: int, seed: int) -> Int64[np.ndarray, "N"]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct features than clusters, which `mine` allows
        return KMeans(clusters, n_init=1, random_state=seed).fit_predict(unit).astype(np.int64)


def _draw_targets(
    image_clusters: Int64[np.ndarray, "N"], text_clusters: Int64[np.ndarray, "N"], random: np.random.Generator
) -> Int64[np.ndarray, "N"]:
    """Returns the image cluster of each product's partner; `NONE` if no cluster has an admissible one."""
    cells = np.zeros((image_clusters.max() + 1, text_clusters.max() + 1))  # (I, T) products
    np.add.at(cells, (image_clusters, text_clusters), 1)
    shares = _even_plan(cells)
    target, carried = np.full(len(image_clusters), NONE, np.int64), np.zeros(len(cells))
    for image, text in np.argwhere(cells):
        share = shares[image, text]  # (I,)
        if not share.any():
            continue
        members = random.permutation(np.flatnonzero((image_clusters == image) & (text_clusters == text)))
        # The rounding error of a cluster is carried over to the next cells.
        parts = _round(np.where(share > 0, share + carried, 0), len(members), share > 0)
        carried += share - parts
        target[members] = np.repeat(np.arange(len(cells)), parts)
    return target


def _even_plan(cells: Float32[np.ndarray, "I T"]) -> Float32[np.ndarray, "I T I"]:
    """Returns how many products of each cell are sent to each image cluster, as fractions.

    A cell's numbers sum to its number of products. Each cell is a target as often as it has products, as nearly as the
    rule allows that no product is sent to its own image or text cluster.
    """
    other_image, other_text = (1 - np.eye(size) for size in cells.shape)
    scale_to = np.ones_like(cells)
    for _ in range(_SINKHORN):
        reached = other_image @ scale_to @ other_text
        scale_from = np.divide(cells, reached, out=np.zeros_like(cells), where=reached > 0)
        reached = other_image @ scale_from @ other_text
        scale_to = np.divide(cells, reached, out=np.zeros_like(cells), where=reached > 0)
    plan = np.einsum("ij,jt->itj", other_image, scale_to @ other_text)  # (I, T, I)
    sums = plan.sum(axis=2, keepdims=True)
    return np.divide(plan * cells[..., None], sums, out=np.zeros_like(plan), where=sums > 0)


def _round(due: np.ndarray, total: int, allowed: np.ndarray) -> Int[np.ndarray, "I"]:
    """Returns whole numbers that sum to `total`, in proportion to `due` (largest remainders), 0 where not allowed."""
    due = np.maximum(due, 0)
    due = due * (total / due.sum()) if due.sum() else allowed * (total / allowed.sum())
    parts = np.floor(due).astype(np.int64)
    order = np.argsort(np.where(allowed, parts - due, np.inf), kind="stable")
    for index in range(total - parts.sum()):
        parts[order[index % allowed.sum()]] += 1
    return parts


def _match(
    rule: _Rule,
    target: Int64[np.ndarray, "N"],
    pool: Int64[np.ndarray, "N"],
    random: np.random.Generator,
    progress: Progress,
) -> tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Returns (partner, similarity), no partner used twice: the cheapest assignment within each random block.

    Args:
      target: the cluster that each product is sent to; `NONE` for a product that gets no partner here.
      pool: the cluster for which each product is a candidate.
    """
    partner, similarity = np.full(len(target), NONE, np.int64), np.full(len(target), np.nan, np.float32)
    blocks = []
    for cluster in np.unique(target[target != NONE]):
        sent, members = (random.permutation(np.flatnonzero(labels == cluster)) for labels in (target, pool))
        parts = -(-max(len(sent), len(members)) // _BLOCK)
        blocks += zip(np.array_split(sent, parts), np.array_split(members, parts), strict=True)
    for products, candidates in progress(blocks, total=len(blocks), desc="matching", unit="block"):
        alike, cost, forbidden = rule.block(products, candidates, random)
        rows, columns = linear_sum_assignment(np.where(forbidden, _FORBIDDEN, cost))
        allowed = ~forbidden[rows, columns]
        rows, columns = rows[allowed], columns[allowed]
        partner[products[rows]], similarity[products[rows]] = candidates[columns], alike[rows, columns]
    return partner, similarity


def _place_rest(
    rule: _Rule,
    partner: Int64[np.ndarray, "N"],
    similarity: Float32[np.ndarray, "N"],
    random: np.random.Generator,
    progress: Progress,
) -> tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Returns both with missing partners filled in, product by product: the cheapest of the least used candidates."""
    partner, similarity, total = partner.copy(), similarity.copy(), len(partner)
    uses, everyone = np.bincount(partner[partner != NONE], minlength=total), np.arange(total)
    missing = random.permutation(np.flatnonzero(partner == NONE))
    blocks = np.array_split(missing, -(-len(missing) * total // _ENTRIES)) if len(missing) else []
    for products in progress(blocks, total=len(blocks), desc="placing the rest", unit="block"):
        alike, cost, forbidden = rule.block(products, everyone, random)
        for row, product in enumerate(products):
            # Costs differ by at most 2, so that one more use always outweighs them.
            ranked = np.where(forbidden[row], np.inf, cost[row] + 3.0 * uses)
            best = ranked.argmin()
            if ranked[best] < np.inf:
                partner[product], similarity[product] = best, alike[row, best]
                uses[best] += 1
    return partner, similarity
