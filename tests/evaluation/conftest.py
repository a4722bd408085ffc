"""Random catalogues, and the figures of a ranking by sorting in float64: the oracle of every protocol."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jaxclip.evaluation.protocols import GroupedEmbeddings
from jaxclip.ranking import kernel
from jaxclip.ranking import ranks as ranks_module

PRODUCTS, TEXTS = 40, 60
PICTURES = ([1] * PRODUCTS, [1, 2, 3, 4, 5, 6, 7, 8] * 5, [1] * 30 + [4] * 8 + [8] * 2)
"""The pictures of each of 40 products, in any order; few choices, because each compiles programs of its own."""


@dataclass(frozen=True)
class Catalogue:
    """Products with 1 to 8 pictures and none to several captions, in groups of 1 to 30; vectors repeat and tie.

    All numbers are small integers, so that scores are exact in float32 too.

    Attributes:
      texts: (Q, D) of the captions. text_names: the number of each caption's words; equal texts have equal vectors.
      owners: (Q,) the product of each caption.
      pictures: (P, D). picture_owners: (P,) the product of each picture.
      groups: (G,) the group of each product.
    """

    texts: np.ndarray
    text_names: np.ndarray
    owners: np.ndarray
    pictures: np.ndarray
    picture_owners: np.ndarray
    groups: np.ndarray

    @property
    def grouped(self) -> tuple[GroupedEmbeddings, GroupedEmbeddings]:
        """The texts and the products, as the protocols take them."""
        texts = GroupedEmbeddings(self.texts, self.groups[self.owners])
        return texts, GroupedEmbeddings(self.pictures, self.groups, self.picture_owners)

    def scores(self) -> np.ndarray:
        """Returns (Q, G) float64: a product's score is the highest of its pictures'."""
        scores = self.texts.astype(np.float64) @ self.pictures.astype(np.float64).T
        return np.stack([scores[:, self.picture_owners == product].max(axis=1) for product in range(PRODUCTS)], axis=1)


@pytest.fixture(scope="session")
def random_catalogue() -> Callable[..., Catalogue]:
    """A function that returns the catalogue of a seed; `captioned`: every product has a caption."""

    def make(seed: int, *, captioned: bool = False) -> Catalogue:
        random = np.random.default_rng(seed)
        picture_owners = np.repeat(np.arange(PRODUCTS), random.permutation(PICTURES[seed % len(PICTURES)]))
        largest = random.integers(1, 31)
        groups = np.concatenate([np.zeros(largest, int), random.integers(1, random.integers(2, 60), PRODUCTS)])
        groups = random.permutation(groups[:PRODUCTS])
        names = random.integers(0, random.integers(5, 200), TEXTS)  # few names: many equal texts
        owners = random.choice(random.permutation(PRODUCTS)[: random.integers(1, PRODUCTS + 1)], TEXTS)
        if captioned:
            owners[:PRODUCTS] = np.arange(PRODUCTS)
        vectors = random.integers(-2, 3, (200, 3)).astype(np.float32)
        pictures = random.integers(-2, 3, (len(picture_owners), 3)).astype(np.float32)
        return Catalogue(vectors[names], names, np.sort(owners), pictures, picture_owners, groups)

    return make


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., dict[str, float]]:
    """A function that returns the mean of each metric, given each query's scores and its right answers."""

    def of_one(scores: np.ndarray, right: set[int], ks: tuple[int, ...]) -> dict[str, float]:
        # Among equal scores, wrong items come first.
        order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in right))
        places = [place for place, item in enumerate(order, start=1) if item in right]
        values = {"mrr": 1 / places[0], "mean_rank": float(places[0])}
        values["map"] = sum(found / place for found, place in enumerate(places, start=1)) / len(places)
        for k in ks:
            top = [place for place in places if place <= k]
            ideal = sum(1 / np.log2(1 + place) for place in range(1, min(k, len(places)) + 1))
            values |= {
                f"hit@{k}": float(bool(top)),
                f"recall@{k}": len(top) / len(places),
                f"precision@{k}": len(top) / k,
                f"ndcg@{k}": sum(1 / np.log2(1 + place) for place in top) / ideal,
            }
        return values

    def of_all(scores, right, ks) -> dict[str, float]:
        queries = [of_one(row, answers, ks) for row, answers in zip(scores, right, strict=True)]
        return {name: float(np.mean([values[name] for values in queries])) for name in queries[0]}

    return of_all


@pytest.fixture
def one_device(quick_compilation, monkeypatch) -> None:
    """Ranks on one device, which is faster for small catalogues, and compiles quickly."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), kernel.AXES, axis_types=axes, devices=jax.devices()[:1])
    monkeypatch.setattr(ranks_module, "make_mesh", lambda *_, **__: mesh)
