"""Judged queries as texts of training pairs: a share of the pairs get a query of their product instead of a caption."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, UInt64
from transformers import PreTrainedTokenizerBase

from jaxclip.config.schema import Config
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Batch
from jaxclip.pipeline.order import Order
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.runtime.tensorflow import tf

if TYPE_CHECKING:
    from jaxclip.catalog.judgements import Judgements  # imports pyarrow


@dataclass(frozen=True, eq=False)
class JudgedQueries:
    """The queries to which N training products are answers: Q different texts, and K pairs of a product and a query.

    Attributes:
      tokens: the token ids of each text.
      starts: where the pairs of each product begin, and K.
      queries: the text of each pair.
      weights: the weight of each pair in the loss: its grade, relative to the highest, times its weight in the file.
    """

    tokens: Int32[np.ndarray, "Q T"]
    starts: Int[np.ndarray, " N+1"]
    queries: Int32[np.ndarray, " K"]
    weights: Float32[np.ndarray, " K"]

    def mixed_into(
        self, batches: Iterable[Batch], config: Config, order: Order, *, steps: range, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Yields the batches of `training_batches`, in which judged queries replace some of the texts.

        Each row has a query with probability `config.augmentation.queries` if its product has any, and then each of
        them equally often. The draws depend only on config.seed and the row's position, as in `training_batches`. Each
        batch also has query (b,) int32, the number of the row's text or -1 if it is a caption, and weight (b,) float32,
        which is 1 for captions.

        Args:
          batches: the batches of `steps`, with `rows` of each.
          config: batch_size, seed and augmentation.queries are used.
          order: the order of the batches' records.
        """
        rows = np.arange(config.batch_size) if rows is None else rows
        for step, batch in zip(steps, batches, strict=True):
            positions = step * config.batch_size + rows
            numbers = order(tf.constant(positions, tf.int64)).numpy()
            whether, which = uniform_draws(config.seed, positions)
            counts = self.starts[numbers + 1] - self.starts[numbers]
            replaced = (whether < config.augmentation.queries) & (counts > 0)
            pair = (self.starts[numbers] + np.floor(which * counts).astype(np.int64))[replaced]
            query, weight = np.full(len(rows), -1, np.int32), np.ones(len(rows), np.float32)
            query[replaced], weight[replaced] = self.queries[pair], self.weights[pair]
            tokens = np.array(batch["text"])
            tokens[replaced] = self.tokens[query[replaced]]
            yield {**batch, "text": tokens, "query": query, "weight": weight}

    def fingerprint(self) -> str:
        """Returns 12 hex digits of a hash of all arrays."""
        arrays = (self.tokens, self.starts, self.queries, self.weights)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:12]


def find_judged_queries(
    config: Config,
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    say: Callable[[str], None],
) -> JudgedQueries | None:
    """Returns the queries of the split train of config.data.queries for these records; None if none are trained on.

    Raises:
      UserError: no file is named, it is missing or malformed, or no product of the records is an answer to a query of
        its split train.
    """
    share = config.augmentation.queries
    if not share:
        return None
    if not config.data.queries:
        raise UserError(f"augmentation.queries = {share} needs data.queries, the file with the judged queries")
    from jaxclip.catalog.judgements import read  # imports pyarrow, which only training on queries needs

    everything, split = read(Path(config.data.queries).expanduser()), config.data.split
    judgements = everything.of_split("train")
    judged = judged_queries(judgements, records.ids(), tokenizer, preprocess)
    answers = int(np.sum(np.diff(judged.starts) > 0))
    if not answers:
        raise UserError(
            f"none of the {len(records):,} training products is an answer (grade > 0) to a query of the split train of "
            f"{config.data.queries}, whose products are named {', '.join(judgements.product_ids[:3])}, ...: its "
            "product ids must be those of the catalogue"
        )
    say(
        f"{answers:,} of {len(records):,} training products are answers to {len(judged.tokens):,} judged queries; "
        f"{share:.0%} of their pairs have a query as text"
    )
    if not everything.has_split(split):
        say(f"{config.data.queries} has no queries of the split {split}: there are no figures of the protocol judged")
    return judged


def judged_queries(
    judgements: "Judgements", ids: Sequence[str], tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess
) -> JudgedQueries:
    """Returns the queries of products by their ids; judgements of grade 0 or weight 0 are left out.

    Texts are worded as in a search (`text.caption` without attributes), and equal ones are one query.
    """
    aligned = judgements.of(ids)
    used = np.flatnonzero((aligned.grades > 0) & (aligned.weights > 0))
    used = used[np.argsort(aligned.items[used], kind="stable")]
    numbers: dict[str, int] = {}
    words = [text.caption(query, {}, preprocess) for query in judgements.texts]
    number_of = np.asarray([numbers.setdefault(word, len(numbers)) for word in words], np.int32)
    grades, weights = aligned.grades[used], aligned.weights[used]
    return JudgedQueries(
        text.encode(tokenizer, list(numbers), preprocess.context_length),
        np.searchsorted(aligned.items[used], np.arange(len(ids) + 1)),
        number_of[aligned.queries[used]],
        (grades / grades.max(initial=1e-30) * weights).astype(np.float32),
    )


def uniform_draws(seed: int, positions: Int[np.ndarray, " b"]) -> Float[np.ndarray, "2 b"]:
    """Returns two independent uniform numbers in [0, 1) for each position, which depend only on it and on the seed.

    They are outputs of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), whose state is the hash of the
    seed plus a multiple of the position.
    """
    state = _mixed(np.asarray([seed], np.int64).astype(np.uint64))
    counters = 2 * positions.astype(np.uint64) + np.arange(2, dtype=np.uint64)[:, None]  # (2, b)
    return (_mixed(state + counters * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def _mixed(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
