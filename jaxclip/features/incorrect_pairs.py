"""Mines incorrect pairs: the image of a product is paired with the text of another product, its partner.

Tagami et al., "Automatic Data Generation of Incorrect Image-Text Pairs for Effective Contrastive Learning of CLIP
Model", section 3.2 (the rule) and section 4.1 (the variants with which it is compared). Variants:

  random          the partner is any product of another group (method 3 of the paper);
  below:T         the partner is any product of another group whose image has a cosine below T with the product's image
                  (methods 4 to 6, with T = 0.8 and 0.2);
  clustered       the rule of the paper: image and text features are clustered by k-means. Another image cluster is
                  drawn for the product at random; the partner is the product of this cluster with the least similar
                  image among those whose text is not in the product's text cluster.

Taken literally, the last rule makes a few outliers the partner of almost every product, and most texts never appear
in an incorrect pair. This module uses the products as partners about equally often, as far as the rule permits:

  1. The other image cluster is drawn at random, not uniformly but such that each cluster is drawn in proportion to its
     size. Among all plans with this property, the plan of largest entropy is found by Sinkhorn scaling over the cells
     (image cluster, text cluster).
  2. The products for which a cluster was drawn and the members of the cluster are split at random into blocks of at
     most 512 of each. In each block, as many products as possible get a different partner each, such that the sum of
     similarities is minimal (an assignment problem, solved exactly). A partner is therefore dissimilar, but not always
     the least similar product.
  3. The products that got no partner in their block are placed one by one: each gets the least used admissible
     partner in any other image cluster and, among equally used ones, the least similar.

For `random` and `below:T`, a single cluster contains all products, and random numbers replace the similarities. None of
the N products is used more than 1 + (N - 1) // A times, where A is the smallest number of admissible partners of any
paired product. A product without an admissible partner is left out and counted. Memory holds the features and one
block of pairs, never all pairs.
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
_BLOCK = 512  # most products on each side of an assignment problem; its time grows with the third power of this
_MAX_PAIRS = 1 << 22  # most pairs in memory at once when all products are candidates
_FORBIDDEN_COST = 4.0 * _BLOCK  # more than avoiding a forbidden pair can cost in a block: costs are from -1 to 1
_SINKHORN_ROUNDS = 30  # few enough not to overflow: if no even plan exists, scales grow by up to N per round

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
    """Returns a partner for each product, by the rules at the head of this module.

    A partner is never in the group of its product and, with `clustered`, never in the same image or text cluster. Pass
    only products of one split, because any of them may become a partner. The result depends only on the arguments, not
    on the number of cores.

    Args:
      image_features: one row per product, of any norm; a row of zeros has a cosine of 0 with all rows.
      text_features: one row per product; only `clustered` uses them.
      groups: group of each product; the products of a group are interchangeable in retrieval.
      variant: "random", "below:T" with -1 < T <= 1, or "clustered".
      clusters: number of image clusters, and of text clusters; fewer are formed if there are fewer distinct features.
      seed: seed of the clustering and of all random draws.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.

    Raises:
      UserError: the variant is unknown, there are fewer than 2 products or clusters or fewer products than clusters, or
        no product has a partner.
      ValueError: the shapes do not match, or a feature is not finite.
    """
    below = threshold(variant)
    _check(image_features, text_features, groups)
    total = len(groups)
    if variant == "clustered" and not 2 <= clusters <= total:
        raise UserError(
            f"incorrect_pairs.clusters = {clusters} is not possible with {total} products: "
            "give at least 2 clusters and at most one per product"
        )
    if total < 2:
        raise UserError(f"{total} products cannot form an incorrect pair: give at least 2")
    images = preprocessing.normalize(np.asarray(image_features, np.float32))
    random = np.random.default_rng(seed)
    # The number of threads changes the order of sums, which could move a product to another cluster.
    with threadpool_limits(1):
        if variant == "clustered":
            image_clusters = _cluster(images, clusters, seed)
            text_clusters = _cluster(preprocessing.normalize(np.asarray(text_features, np.float32)), clusters, seed)
            sources, targets = image_clusters, _draw_targets(image_clusters, text_clusters, random)
        else:
            image_clusters = text_clusters = None
            sources = targets = np.zeros(total, np.int64)
        rule = _Rule(images, groups, image_clusters, text_clusters, below)
        matched = _match(rule, targets, sources, random, progress)
        partner, similarity = _place_unmatched(rule, *matched, random, progress)
    if (partner == NONE).all():
        reason = _explain_failure(variant, image_clusters, text_clusters)
        raise UserError(
            f"no product has an incorrect pair with the variant {variant!r}: {reason}; "
            "choose another incorrect_pairs.variant or a more varied catalogue"
        )
    input_hash = fingerprint(image_features, text_features, groups)
    return MinedPairs(partner, similarity, image_clusters, text_clusters, input_hash)


@dataclass(frozen=True)
class _Rule:
    """The conditions for partners, evaluated for one block of pairs at a time."""

    images: Float32[np.ndarray, "N D"]  # unit rows
    groups: Int64[np.ndarray, "N"]
    image_clusters: Int64[np.ndarray, "N"] | None
    text_clusters: Int64[np.ndarray, "N"] | None
    threshold: float

    def block(
        self, products: Int64[np.ndarray, "R"], candidates: Int64[np.ndarray, "C"], random: np.random.Generator
    ) -> tuple[Float32[np.ndarray, "R C"], Float32[np.ndarray, "R C"], Bool[np.ndarray, "R C"]]:
        """Returns (similarity, cost, forbidden) of each pair of R products (rows) and C candidates (columns).

        Costs are from -1 to 1, and lower is better.
        """
        similarity = np.clip(self.images[products] @ self.images[candidates].T, -1, 1)
        forbidden = self.groups[products, None] == self.groups[candidates]
        for labels in (self.image_clusters, self.text_clusters):
            if labels is not None:
                forbidden |= labels[products, None] == labels[candidates]
        if not math.isinf(self.threshold):
            forbidden |= similarity >= self.threshold
        cost = random.random(similarity.shape, np.float32) if self.image_clusters is None else similarity
        return similarity, cost, forbidden


def threshold(variant: str) -> float:
    """Returns the cosine below which a variant admits partners, or infinity; UserError if the variant is unknown."""
    if variant in ("random", "clustered"):
        return math.inf
    name, _, number = variant.partition(":")
    try:
        below = float(number) if name == "below" else math.nan
    except ValueError:
        below = math.nan
    if not -1 < below <= 1:
        raise UserError(
            f"unknown variant {variant!r} of incorrect pairs: give random, clustered, or below:T with a cosine T above "
            "-1 and at most 1, as in below:0.2"
        )
    return below


def _check(image_features: np.ndarray, text_features: np.ndarray, groups: np.ndarray) -> None:
    shapes = image_features.shape, text_features.shape, groups.shape
    if [len(shape) for shape in shapes] != [2, 2, 1] or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"expected features (N, D) and (N, E) and groups (N,), got {shapes}")
    for name, features in (("image", image_features), ("text", text_features)):
        if not np.isfinite(features).all():
            raise ValueError(
                f"the {name} features have {(~np.isfinite(features).all(axis=1)).sum()} rows that are not finite"
            )


def _explain_failure(variant: str, image_clusters: np.ndarray | None, text_clusters: np.ndarray | None) -> str:
    for labels, kind in ((image_clusters, "image"), (text_clusters, "text")):
        if labels is not None and (labels == labels[0]).all():
            return f"all {kind} features fall into one cluster"
    if variant == "clustered":
        return "all products of other image clusters are in the same text cluster or group"
    return "all products are in one group" + (", or their images are too similar" if variant != "random" else "")


def _cluster(unit: Float32[np.ndarray, "N D"], clusters: int, seed: int) -> Int64[np.ndarray, "N"]:
    with warnings.catch_warnings():
        # KMeans warns if there are fewer distinct features than clusters, which `mine` allows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(clusters, n_init=1, random_state=seed).fit_predict(unit).astype(np.int64)


def _draw_targets(
    image_clusters: Int64[np.ndarray, "N"], text_clusters: Int64[np.ndarray, "N"], random: np.random.Generator
) -> Int64[np.ndarray, "N"]:
    """Returns the image cluster of each product's partner; `NONE` if no cluster has an admissible partner."""
    # Number of products in each cell, (I, T), where I and T are the numbers of image and text clusters.
    cells = np.zeros((image_clusters.max() + 1, text_clusters.max() + 1))
    np.add.at(cells, (image_clusters, text_clusters), 1)
    shares = _even_plan(cells)
    targets, carried = np.full(len(image_clusters), NONE, np.int64), np.zeros(len(cells))
    for image, text in np.argwhere(cells):
        share = shares[image, text]  # (I,)
        if not share.any():
            continue
        members = random.permutation(np.flatnonzero((image_clusters == image) & (text_clusters == text)))
        # The rounding error of each target cluster is carried over to the next cells.
        parts = _apportion(np.where(share > 0, share + carried, 0), len(members), share > 0)
        carried += share - parts
        targets[members] = np.repeat(np.arange(len(cells)), parts)
    return targets


def _even_plan(cells: Float32[np.ndarray, "I T"]) -> Float32[np.ndarray, "I T I"]:
    """Returns the number, not rounded, of products in each cell whose partner comes from each image cluster.

    A cell is a pair of one of I image clusters and one of T text clusters; `cells` has the number of products in each.
    The numbers of a cell sum to its number of products, or to 0 if it has no admissible partner. Each cell provides
    about as many partners as it has products, under the condition that no partner is in the image or text cluster of
    its product.
    """
    other_image, other_text = (1 - np.eye(size) for size in cells.shape)
    scale_to = np.ones_like(cells)
    for _ in range(_SINKHORN_ROUNDS):
        reached = other_image @ scale_to @ other_text
        scale_from = np.divide(cells, reached, out=np.zeros_like(cells), where=reached > 0)
        reached = other_image @ scale_from @ other_text
        scale_to = np.divide(cells, reached, out=np.zeros_like(cells), where=reached > 0)
    plan = np.einsum("ij,jt->itj", other_image, scale_to @ other_text)  # (I, T, I)
    sums = plan.sum(axis=2, keepdims=True)
    return np.divide(plan * cells[..., None], sums, out=np.zeros_like(plan), where=sums > 0)


def _apportion(weights: np.ndarray, total: int, allowed: np.ndarray) -> Int[np.ndarray, "I"]:
    """Returns whole numbers that sum to `total`, in proportion to `weights` (largest remainders); 0 if not allowed."""
    weights = np.maximum(weights, 0)
    quotas = weights * (total / weights.sum()) if weights.sum() else allowed * (total / allowed.sum())
    parts = np.floor(quotas).astype(np.int64)
    order = np.argsort(np.where(allowed, parts - quotas, np.inf), kind="stable")
    for index in range(total - parts.sum()):
        parts[order[index % allowed.sum()]] += 1
    return parts


def _match(
    rule: _Rule,
    targets: Int64[np.ndarray, "N"],
    sources: Int64[np.ndarray, "N"],
    random: np.random.Generator,
    progress: Progress,
) -> tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Returns (partner, similarity) of the cheapest assignment within each random block; no partner is used twice.

    Args:
      rule: the conditions for partners.
      targets: the cluster from which each product gets its partner; `NONE` for a product that gets no partner here.
      sources: the cluster to which each product belongs as a candidate.
      random: generator of the blocks and random costs.
      progress: see `mine`.
    """
    partner, similarity = np.full(len(targets), NONE, np.int64), np.full(len(targets), np.nan, np.float32)
    blocks = []
    for cluster in np.unique(targets[targets != NONE]):
        products, members = (random.permutation(np.flatnonzero(labels == cluster)) for labels in (targets, sources))
        parts = -(-max(len(products), len(members)) // _BLOCK)
        blocks += zip(np.array_split(products, parts), np.array_split(members, parts), strict=True)
    for products, candidates in progress(blocks, total=len(blocks), desc="matching", unit="block"):
        cosines, cost, forbidden = rule.block(products, candidates, random)
        rows, columns = linear_sum_assignment(np.where(forbidden, _FORBIDDEN_COST, cost))
        allowed = ~forbidden[rows, columns]
        rows, columns = rows[allowed], columns[allowed]
        partner[products[rows]], similarity[products[rows]] = candidates[columns], cosines[rows, columns]
    return partner, similarity


def _place_unmatched(
    rule: _Rule,
    partner: Int64[np.ndarray, "N"],
    similarity: Float32[np.ndarray, "N"],
    random: np.random.Generator,
    progress: Progress,
) -> tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Returns (partner, similarity) in which unmatched products get the cheapest of their least used candidates."""
    partner, similarity, total = partner.copy(), similarity.copy(), len(partner)
    uses, candidates = np.bincount(partner[partner != NONE], minlength=total), np.arange(total)
    unmatched = random.permutation(np.flatnonzero(partner == NONE))
    blocks = np.array_split(unmatched, -(-len(unmatched) * total // _MAX_PAIRS)) if len(unmatched) else []
    for products in progress(blocks, total=len(blocks), desc="placing unmatched products", unit="block"):
        cosines, cost, forbidden = rule.block(products, candidates, random)
        for row, product in enumerate(products):
            # Costs differ by at most 2, so one more use always outweighs them.
            total_cost = np.where(forbidden[row], np.inf, cost[row] + 3.0 * uses)
            best = total_cost.argmin()
            if total_cost[best] < np.inf:
                partner[product], similarity[product] = best, cosines[row, best]
                uses[best] += 1
    return partner, similarity
