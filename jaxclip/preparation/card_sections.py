"""The data card's sections that are added last: caption lengths in tokens, agreement of colours, incorrect pairs."""

import itertools
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.catalog import builder, card, card_figures
from jaxclip.config import Config
from jaxclip.features import agreement
from jaxclip.features.pair_table import MinedPairs
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.preparation import mining
from jaxclip.towers.towers import make_preprocess, make_tokenizer

SHOWN_PAIRS, SHOWN_SEED = 24, 0
TOKENIZED_AT_ONCE = 1024


def complete(config: Config, prepared: Path, *, say: Callable[[str], None]) -> MinedPairs | None:
    """Adds the last sections to a prepared dataset's card, and mines its incorrect pairs unless they are stored.

    A section is left out if the dataset lacks what it shows: captions, computed and stated colours, or pairs.

    Args:
      config: the configuration; its settings of texts, tokenizer, incorrect pairs and mesh matter.
      prepared: folder of the dataset.
      say: called with each line to show to the user.

    Returns: the pairs; None if there is no training split, or if `incorrect_pairs.features` is "classical" and the
      dataset was prepared without a describer.

    Raises:
      UserError: see `mining.find_or_mine`.
    """
    path = prepared / builder.CARD
    everything = Records(prepared, "all")
    has_training_split = Records.has(prepared, mining.TRAIN)
    training = Records(prepared, mining.TRAIN) if has_training_split else everything
    if any(product.captions for product, _ in everything.products()):
        card.put(path, "tokens", _tokens(config, everything, training))
    described = "colour_names" in everything.features
    if described and (attribute := agreement.colour_attribute(p.attributes for p, _ in everything.products())):
        stated = [product.attributes.get(attribute, "") for product, _ in everything.products()]
        comparison = agreement.compare(stated, everything.columns(("colour_names",))["colour_names"])
        card.put(
            path, "colours", {"attribute": attribute, **vars(comparison), "confusion": comparison.confusion.tolist()}
        )
    if not has_training_split or not (described or config.incorrect_pairs.features != mining.CLASSICAL):
        return None
    pairs = mining.find_or_mine(config, prepared, say=say)
    card.put(path, "pairs", _pairs(config, prepared, pairs))
    return pairs


def _tokens(config: Config, records: Records, training: Records) -> dict[str, Any]:
    """Returns the values of the section "tokens"; if no tokenizer is configured, one is trained on `training`."""
    preprocess = make_preprocess(config)
    tokenizer = make_tokenizer(config, preprocess, training)
    texts = (text.caption(caption, p.attributes, preprocess) for p, _ in records.products() for caption in p.captions)
    lengths = array("L")
    while block := list(itertools.islice(texts, TOKENIZED_AT_ONCE)):
        lengths.extend(map(len, tokenizer(block)["input_ids"]))
    return {
        "tokenizer": config.data.tokenizer
        or f"a byte-level BPE of {len(tokenizer):,} tokens, as training would make it",
        "context": preprocess.context_length,
        "truncated": sum(length > preprocess.context_length for length in lengths),
        "lengths": card_figures.histogram(lengths),
    }


def _pairs(config: Config, prepared: Path, pairs: MinedPairs) -> dict[str, Any]:
    """Returns the values of the section "pairs", with a random sample of the pairs."""
    records = Records(prepared, mining.TRAIN)
    titles = [product.title for product, _ in records.products()]
    random = np.random.default_rng(SHOWN_SEED)
    sample = random.choice(pairs.products, min(SHOWN_PAIRS, len(pairs.products)), replace=False)
    settings = mining.settings(config, prepared)

    def example(product: int, partner: int) -> dict[str, Any]:
        picture, partner_picture = (card.data_uri(records.pictures(number)[0]) for number in (product, partner))
        texts = {"own": titles[product], "text": titles[partner]}
        return {
            "picture": picture,
            "partner_picture": partner_picture,
            "similarity": float(pairs.similarity[product]),
            **texts,
        }

    clusters = {"pictures": pairs.image_clusters, "texts": pairs.text_clusters}
    return {
        "settings": settings,
        "summary": pairs.summary(),
        "table": mining.table(prepared, settings).relative_to(prepared),
        "clusters": {
            kind: sorted(np.bincount(labels).tolist(), reverse=True)
            for kind, labels in clusters.items()
            if labels is not None
        },
        "pairs": [example(int(product), int(pairs.partner[product])) for product in sample],
    }
