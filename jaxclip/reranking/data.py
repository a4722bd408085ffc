"""The data of a re-ranker: its first stage, products that the towers were not trained on, features and candidates."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxclip.catalog import captions
from jaxclip.config import Config
from jaxclip.config.saved import of_run
from jaxclip.errors import UserError
from jaxclip.features import rerank
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records
from jaxclip.ranking import candidates as second_stage
from jaxclip.ranking.candidates import Candidates
from jaxclip.reranking import first_stage
from jaxclip.reranking.first_stage import IMAGE_TOKENS, FirstStage, Split
from jaxclip.runtime import files
from jaxclip.runtime.progress import bar

FILENAME, QUERYBANK, VOCABULARY = "first_stage.json", "querybank.npy", "attributes.json"
LEAST = 5  # number of products that an attribute value needs to be in the vocabulary
SEEN_BY_TOWERS = (
    "picture", "image_size", "resize", "mean", "std", "caption_template", "lowercase", "tokenizer", "vocab_size",
    "context_length",
)  # fmt: skip
"""Fields of config.data that define the preprocessing of the towers' inputs."""
Vocabulary = dict[str, list[str]]
"""Column of the catalogue -> its values that have an entry in the multi-hot features."""


def find_first_stage(config: Config, workdir: Path, towers_config: Config | None = None) -> FirstStage:
    """Returns the configured first stage on the configured mesh.

    If the re-ranker's workdir already has a first_stage.json, the step that it names is loaded, and the fingerprint is
    compared with the one that it holds. Otherwise the newest step is loaded.

    Args:
      config: configuration of the re-ranker.
      workdir: workdir of the re-ranker.
      towers_config: configuration of the towers; by default the one in their workdir.

    Raises:
      UserError: the fingerprint differs from that in first_stage.json; the configuration sets other preprocessing than
        that of the towers; or for the reasons given in `first_stage.load`.
    """
    towers = Path(config.first_stage).expanduser()
    towers_config = replace(towers_config or of_run(towers, {}), mesh=config.mesh)
    different = [name for name in SEEN_BY_TOWERS if getattr(config.data, name) != getattr(towers_config.data, name)]
    if different:
        fields = ", ".join(f"data.{name}" for name in different)
        raise UserError(
            f"{fields} cannot be changed after the training of the towers in {towers}, which get pictures and captions "
            f"as in training; leave {fields} out"
        )
    path = workdir / FILENAME
    if not path.exists():
        return first_stage.load(towers, towers_config)
    saved = json.loads(path.read_text())
    try:
        stage = first_stage.load(towers, towers_config, saved["step"])
    except UserError as error:
        raise UserError(f"{workdir} re-ranks step {saved['step']} of {saved['path']}: {error}") from None
    if stage.fingerprint != saved["fingerprint"]:
        raise UserError(
            f"{workdir} was trained on the first stage {saved['fingerprint']} ({saved['path']}, step {saved['step']}), "
            f"but first_stage = {towers} is {stage.fingerprint}, whose scores differ; set --config.first_stage to the "
            "workdir that the re-ranker was trained on"
        )
    return stage


def save_first_stage(stage: FirstStage, bank: np.ndarray, vocabulary: Vocabulary, workdir: Path) -> None:
    """Writes querybank.npy, attributes.json and first_stage.json (path, step and fingerprint of the towers).

    first_stage.json is written last, so that its presence means that the other files are complete. If the workdir
    already has it, nothing is written.
    """
    if (workdir / FILENAME).exists():
        return
    np.save(workdir / QUERYBANK, bank)
    (workdir / VOCABULARY).write_text(json.dumps(vocabulary, indent=1, ensure_ascii=False) + "\n")
    facts = {"path": str(stage.workdir.resolve()), "step": stage.step, "fingerprint": stage.fingerprint}
    files.write_json(workdir / FILENAME, facts)


def find_querybank(config: Config, stage: FirstStage, workdir: Path) -> np.ndarray:
    """Returns the workdir's query bank, or else a new one: (M, D) embeddings of captions of the towers' training data.

    Raises:
      UserError: the workdir has no first_stage.json, and the dataset that the towers were trained on is missing or has
        changed.
    """
    if (workdir / FILENAME).exists():
        return np.load(workdir / QUERYBANK)
    return first_stage.querybank(stage, segments=config.rerank.segments, batch_size=config.evaluation.batch_size)


def training_records(config: Config, stage: FirstStage, prepared: Path) -> Records:
    """Returns the products to train a re-ranker on: training products that the towers never saw.

    On their own training products the towers mostly rank the answer first already, so a re-ranker trained on these
    products would only learn to keep the order. If the towers' dataset is used, the products are those that were held
    back from the towers (`data.second_stage`); otherwise they are the training split of the other dataset.

    Raises:
      UserError: no products were held back from the towers, or data.second_stage or data.split_seed differ from those
        of the towers; or the training split of the other dataset contains pictures that the towers were trained on, or
        the towers' dataset, which is needed to check this, is missing or has changed.
    """
    if prepared_data.data_fingerprint(prepared) != first_stage.data_fingerprint(stage):
        records = Records(prepared, "train", config.data.train)
        _check_unseen(stage, records)
        return records
    configured, held_back = config.data.second_stage, stage.config.data.second_stage
    if not held_back or configured != held_back or config.data.split_seed != stage.config.data.split_seed:
        towers_values = f"data.second_stage={held_back:g} and data.split_seed={stage.config.data.split_seed}"
        remedy = (
            f"set {towers_values}" if held_back else "train the towers with --config.data.second_stage=0.1, or more"
        )
        raise UserError(
            f"data.second_stage = {configured:g} (split_seed {config.data.split_seed}), but first_stage = "
            f"{stage.workdir} held back {held_back:g} (split_seed {stage.config.data.split_seed}): a re-ranker is "
            f"trained on exactly the products that its towers did not see; {remedy}"
        )
    return prepared_data.training_records(stage.config, prepared)[1]


def _check_unseen(stage: FirstStage, records: Records) -> None:
    """Raises UserError if a record has a picture that the towers were trained on."""
    seen = _pictures(first_stage.training_records(stage))
    if count := len(seen & _pictures(records)):
        raise UserError(
            f"{count} pictures of the {len(records)} products to train on are pictures that the towers in "
            f"{stage.workdir} were trained on: remove these products, as a re-ranker needs products that the towers "
            "never saw"
        )


def _pictures(records: Records) -> set[bytes]:
    """Returns the hashes of the records' encoded pictures."""
    return {
        hashlib.blake2b(picture, digest_size=16).digest()
        for number in bar(range(len(records)), desc="comparing pictures", unit="product", leave=False)
        for picture in records.pictures(number)
    }


def embedded(config: Config, stage: FirstStage, prepared: Path, records: Records, *, wordings: int = 1) -> Split:
    """Returns the records as a split: embedded by the first stage, or read from the cache; features not computed."""
    with jax.set_mesh(stage.towers.mesh):
        return first_stage.embed_split(
            stage,
            prepared,
            records,
            wordings=wordings,
            segments=config.rerank.segments,
            tokens=config.rerank.preset == "cross_attention",
            batch_size=config.evaluation.batch_size,
            workers=config.data.workers,
        )


def find_vocabulary(split: Split, workdir: Path) -> Vocabulary:
    """Returns the vocabulary of attribute values: the workdir's if it has one, else one made from the split.

    Values that fewer than 5 products have are left out, because they are too rare to learn from.
    """
    if (workdir / VOCABULARY).exists():
        return json.loads((workdir / VOCABULARY).read_text())
    counts = Counter(pair for attributes in split.attributes for pair in json.loads(str(attributes)).items())
    vocabulary: Vocabulary = {}
    for column, value in sorted(pair for pair, count in counts.items() if count >= LEAST):
        vocabulary.setdefault(column, []).append(value)
    return vocabulary


def with_features(split: Split, stage: FirstStage, bank: np.ndarray, vocabulary: Vocabulary) -> Split:
    """Returns the split with every feature of `features.rerank`, and with its image tokens, if any, as a feature."""
    sources = rerank.FeatureSources(
        images=split.images[split.main],
        crops=split.crops[split.main],
        colour_names=split.colour_names,
        columns=split.columns,
        attributes=[json.loads(str(attributes)) for attributes in split.attributes],
        bank=bank,
        logit_scale=stage.logit_scale,
        vocabulary=vocabulary,
        in_captions=captions.fields(stage.towers.preprocess.caption_template),
    )
    features, present = rerank.compute(sources)
    if split.image_tokens is not None:
        features[IMAGE_TOKENS], present[IMAGE_TOKENS] = split.image_tokens, np.ones(len(split.groups), bool)
    return replace(split, features=features, present=present)


def retrieve(config: Config, split: Split) -> Candidates:
    """Returns the candidates of every query of a split: the `rerank.candidates` products with the highest cosines."""
    owners = split.groups[split.owners]
    return second_stage.retrieve(
        split.queries,
        split.images,
        owners,
        split.groups,
        config.rerank.candidates,
        picture_owners=split.picture_owners,
    )
