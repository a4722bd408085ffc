"""What a training run of towers needs: data, towers and length, all validated before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxclip.config import Config
from jaxclip.models.attention import resolve
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.pipeline.batches import Partners
from jaxclip.pipeline.judged_queries import JudgedQueries, find_judged_queries
from jaxclip.pipeline.records import Records
from jaxclip.towers.towers import Towers, make_or_load_towers
from jaxclip.training import device_resize
from jaxclip.training.optimizer import capped_warmup
from jaxclip.training.recipe import abstract_batch, number_of_steps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What a run needs.

    Attributes:
      prepared: folder of the prepared dataset.
      records: training records, without products that are held back for a re-ranker.
      trained: keys of the groups that the run trains on, or that its initial parameters were trained on.
      test: records that the final evaluation ranks.
      notes: what must be said with figures on them (see `trained_groups.unseen_records`).
      validation: records that evaluations during training rank, by which the best checkpoint is chosen; None if the
        dataset has no validation split.
      partners: incorrect pairs of the training records; None if the loss does not need them.
      towers: towers to train.
      steps: length of the run in steps.
      judged: queries that are texts of some of the training pairs; None if captions alone are.
      canvas: side, in pixels, of the squares in which devices receive unscaled pictures; 0 = the host scales them.
    """

    prepared: Path
    records: Records
    trained: trained_groups.Keys
    test: Records
    notes: list[str]
    validation: Records | None
    partners: Partners | None
    towers: Towers
    steps: int
    judged: JudgedQueries | None
    canvas: int


def set_up(config: Config, workdir: Path, say: Say) -> Setup:
    """Returns what a run in this workdir needs; writes nothing into the workdir.

    Raises:
      UserError: the configuration or the data is invalid.
    """
    prepared = prepared_data.prepared_dataset(config, whole=False, say=say)
    records, _ = prepared_data.training_records(config, prepared)
    trained = trained_groups.known_groups(config, workdir, prepared, records, say)
    test, notes, validation = trained_groups.evaluated_records(config, prepared, trained, say)
    steps = number_of_steps(config, records)
    towers = make_or_load_towers(config, workdir, records)
    configured, warmup = config.optimizer.warmup_steps, capped_warmup(config.optimizer.warmup_steps, steps)
    if warmup < configured:
        say(f"optimizer.warmup_steps = {configured} is more than half of this run's {steps} steps: {warmup} are used")
    abstract_batch(config, towers)
    attention_of(towers)
    partners = _partners(config, prepared, records, say)
    judged = find_judged_queries(config, records, towers.tokenizer, towers.preprocess, say)
    canvas = device_resize.choose_canvas(config.data.resize_on, records, towers.preprocess, config.augmentation)
    if canvas.line:
        say(canvas.line)
    return Setup(prepared, records, trained, test, notes, validation, partners, towers, steps, judged, canvas.side)


def attention_of(towers: Towers) -> str:
    """Returns the implementation of attention in the towers; raises UserError if it does not exist on this machine."""
    blocks = (towers.config.image.transformer, towers.config.text.transformer)
    found = (resolve(x.attention, x.dtype, queries=2, head=x.width // x.heads) for x in blocks)
    return ", ".join(dict.fromkeys(found))


def _partners(config: Config, prepared: Path, records: Records, say: Say) -> Partners | None:
    if config.loss.name != "incorrect_pairs":
        return None
    from jaxclip.preparation import mining  # imports scikit-learn, which only this loss needs

    pairs = mining.find_or_mine(config, prepared, say=say)
    return Partners(pairs.partner, pairs.similarity).take(records.numbers)
