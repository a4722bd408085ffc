"""What a second stage works on: its first stage, products that this one never saw, and their candidates."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxclip.catalog import captions
from jaxclip.config import Config, load_config
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records
from jaxclip.ranking import candidates as second_stage
from jaxclip.ranking.candidates import Candidates
from jaxclip.reranking import first_stage
from jaxclip.reranking.first_stage import FirstStage, Split
from jaxclip.runtime import files
from jaxclip.runtime.progress import bar

FILENAME, QUERYBANK, VOCABULARY = "first_stage.json", "querybank.npy", "attributes.json"
LEAST = 5
SEEN_BY_TOWERS = (
    "picture", "image_size", "resize", "mean", "std", "caption_template", "lowercase", "tokenizer", "vocab_size",
    "context_length",
)  # fmt: skip
"""Fields of the data that say how a product reaches the towers."""
Vocabulary = dict[str, list[str]]
"""Column -> its values."""


def find_first_stage(config: Config, workdir: Path, own: Config | None = None) -> FirstStage:
    """Returns the configured first stage, on the mesh configured: where a workdir has begun, only what it began with.

    `own` is the configuration of its towers, by default the one in their workdir.

    Raises:
      UserError: it is another one (with both fingerprints), or it has not the checkpoint that was trained on; the
        configuration would have pictures or captions reach it in another way than its own.
    """
    where = Path(config.first_stage).expanduser()
    own = replace(own or load_config(where), mesh=config.mesh)
    if other := [name for name in SEEN_BY_TOWERS if getattr(config.data, name) != getattr(own.data, name)]:
        raise UserError(
            f"{', '.join(f'data.{name}' for name in other)} would change nothing: pictures and captions reach the "
            f"towers in {where} as these were trained; leave it out"
        )
    path = workdir / FILENAME
    if not path.exists():
        return first_stage.load(where, own)
    begun = json.loads(path.read_text())
    try:
        found = first_stage.load(where, own, begun["step"])
    except UserError as error:
        raise UserError(f"{workdir} re-ranks step {begun['step']} of {begun['path']}: {error}") from None
    if found.fingerprint != begun["fingerprint"]:
        raise UserError(
            f"{workdir} was trained on the first stage {begun['fingerprint']} ({begun['path']}, step {begun['step']}), "
            f"and first_stage = {where} is {found.fingerprint}: its scores mean something else; name the right "
            "one with --config.first_stage"
        )
    return found


def save_first_stage(first: FirstStage, bank: np.ndarray, vocabulary: Vocabulary, workdir: Path) -> None:
    """Writes querybank.npy, attributes.json and then first_stage.json: path, step and fingerprint of the towers."""
    if (workdir / FILENAME).exists():
        return
    np.save(workdir / QUERYBANK, bank)
    (workdir / VOCABULARY).write_text(json.dumps(vocabulary, indent=1, ensure_ascii=False) + "\n")
    facts = {"path": str(first.workdir.resolve()), "step": first.step, "fingerprint": first.fingerprint}
    files.write_json(workdir / FILENAME, facts)


def find_querybank(config: Config, first: FirstStage, workdir: Path) -> np.ndarray:
    """Returns the workdir's bank of queries, drawn from the captions that the towers were trained on where it has none.

    Raises:
      UserError: there is none to be drawn, for the dataset that the towers were trained on is not there.
    """
    if (workdir / FILENAME).exists():
        return np.load(workdir / QUERYBANK)
    return first_stage.querybank(first, segments=config.rerank.segments, batch_size=config.evaluation.batch_size)


def training_split(config: Config, first: FirstStage, prepared: Path, bank: np.ndarray) -> Split:
    """Returns the products to train a second stage on: those of the training split that the towers never saw.

    On products the towers were trained on they rank the answer first because they remember it. A re-ranker trained
    there learns to trust their order, and its own figures on such rankings mean nothing. So these are the products of
    the towers' own dataset that were held back from them, or those of another dataset that shares none with it.

    Raises:
      UserError: the towers saw all of the products, or some of another dataset's.
    """
    if prepared_data.data_fingerprint(prepared) != first_stage.data_fingerprint(first):
        records = Records(prepared, "train", config.data.train)
        _check_unseen(first, records)
        return embedded(config, first, prepared, records, bank=bank, wordings=config.rerank.wordings)
    wanted, own = config.data.second_stage, first.config.data.second_stage
    if not own or wanted != own or config.data.split_seed != first.config.data.split_seed:
        raise UserError(
            f"data.second_stage = {wanted:g} (split_seed {config.data.split_seed}), and first_stage = {first.workdir} "
            f"held back {own:g} (split_seed {first.config.data.split_seed}): a re-ranker is trained on exactly the "
            "products that its towers did not see; train them with --config.data.second_stage=0.1, or more"
        )
    _, held = prepared_data.training_records(first.config, prepared)
    return embedded(config, first, prepared, held, bank=bank, wordings=config.rerank.wordings)


def _check_unseen(first: FirstStage, records: Records) -> None:
    seen = _pictures(first_stage.training_records(first))
    if known := sum(picture in seen for picture in _pictures(records)):
        raise UserError(
            f"{known} of the {len(records)} products to train on have pictures that the towers in {first.workdir} were "
            "trained on: a re-ranker needs products that they never saw"
        )


def _pictures(records: Records) -> set[bytes]:
    return {
        hashlib.blake2b(records.picture(number), digest_size=16).digest()
        for number in bar(range(len(records)), desc="comparing pictures", unit="picture", leave=False)
    }


def embedded(
    config: Config, first: FirstStage, prepared: Path, records: Records, *, bank: np.ndarray, wordings: int = 1
) -> Split:
    """Returns the records as the first stage embeds them, kept under the cache, with their hubness by the bank."""
    with jax.set_mesh(first.towers.mesh):
        split = first_stage.embed_split(
            first,
            prepared,
            records,
            wordings=wordings,
            segments=config.rerank.segments,
            tokens=config.rerank.preset == "cross_attention",
            batch_size=config.evaluation.batch_size,
            workers=config.data.workers,
        )
    return with_hubness(split, first, bank)


def with_hubness(split: Split, first: FirstStage, bank: np.ndarray) -> Split:
    """Returns the split with its pictures' hubness by the bank."""
    hubness = first_stage.hubness(split.features["image"], bank, first.logit_scale)
    features = {"hubness": hubness, **split.features}
    return replace(split, features=features, present={"hubness": np.ones(len(hubness), bool), **split.present})


def find_vocabulary(split: Split, workdir: Path) -> Vocabulary:
    """Returns the columns and values of attributes that a re-ranker knows: the workdir's, else those of the split.

    A value counts from 5 products on; rarer ones cannot be learned from.
    """
    if (workdir / VOCABULARY).exists():
        return json.loads((workdir / VOCABULARY).read_text())
    counts = Counter(pair for attributes in split.attributes for pair in json.loads(str(attributes)).items())
    vocabulary: Vocabulary = {}
    for column, value in sorted(pair for pair, count in counts.items() if count >= LEAST):
        vocabulary.setdefault(column, []).append(value)
    return vocabulary


def with_attributes(split: Split, vocabulary: Vocabulary, template: str) -> Split:
    """Returns the split with what its products' attributes are as 0 and 1: two features, for they say different things.

    `attributes` are the columns from which no caption is worded; `caption_attributes` those that the template puts into
    captions. Where queries are captions, the latter look up what a query was made from: as a search by filters does,
    but of a test it says little about pictures.
    """
    inside = captions.fields(template)
    known = [json.loads(str(attributes)) for attributes in split.attributes]
    features, present = dict(split.features), dict(split.present)
    for name, worded in (("attributes", False), ("caption_attributes", True)):
        columns = [column for column in vocabulary if (column in inside) == worded]
        places = {pair: place for place, pair in enumerate((c, v) for c in columns for v in vocabulary[c])}
        hot = np.zeros((len(known), max(1, len(places))), np.float32)
        for row, attributes in enumerate(known):
            hot[row, [places[pair] for pair in attributes.items() if pair in places]] = 1.0
        features[name], present[name] = hot, hot.any(axis=1)
    return replace(split, features=features, present=present)


def retrieve(config: Config, split: Split) -> Candidates:
    """Returns the first stage's top K for every query of a split."""
    owners = split.groups[split.owners]
    return second_stage.retrieve(split.queries, split.features["image"], owners, split.groups, config.rerank.candidates)
