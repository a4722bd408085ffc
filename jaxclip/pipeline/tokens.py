"""The token ids of a dataset's captions, computed once and read from memory-mapped files in its folder."""

import hashlib
import json
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.prefetch import prefetch
from jaxclip.pipeline.prepared_data import data_fingerprint
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.words import CaptionTokenizer
from jaxclip.runtime import distributed, files, folders
from jaxclip.runtime.progress import bar

FOLDER = "tokens"
RULES = 1
"""Version of the code that builds captions and their tokens; to be raised when the same captions get other tokens."""
SETTINGS, TOKENS, ENDS, FIRSTS = "settings.json", "tokens.bin", "ends.bin", "firsts.bin"
UNCHANGED = Augmentation(keep_attributes=1.0, keep_words=1.0, prompts=False)


class StoredTokens:
    """The stored tokens of N records, which have C captions; see `find_or_store`.

    Files: tokens.bin has the captions' tokens without their padding, back to back, uint16 if all ids fit and int32
    otherwise; ends.bin the place in it where each caption ends, (C,) int64; firsts.bin the number of each record's
    first caption, and C, (N + 1,) int64. Nothing is read before it is needed.

    Raises:
      UserError: a file is missing or incomplete.
    """

    def __init__(self, folder: Path):
        settings = json.loads((folder / SETTINGS).read_text())
        self.context_length, self._padding = settings["context_length"], settings["padding"]
        self._tokens, self._ends, self._firsts = (
            _map(folder / name, dtype, settings["bytes"][name])
            for name, dtype in ((TOKENS, settings["dtype"]), (ENDS, "<i8"), (FIRSTS, "<i8"))
        )

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def counts(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the number of captions of the records with these numbers, int64."""
        return self._firsts[numbers + 1] - self._firsts[numbers]

    def read(self, numbers: Int[np.ndarray, " n"], chosen: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n T"]:
        """Returns the padded token ids of one caption of each record, int32; `chosen`: its index in the record."""
        caption = self._firsts[numbers] + chosen
        ends = self._ends[caption]
        starts = np.where(caption, self._ends[np.maximum(caption, 1) - 1], 0)
        rows = np.full((len(caption), self.context_length), self._padding, np.int32)
        filled = np.arange(self.context_length) < (ends - starts)[:, None]
        rows[filled] = self._tokens[(starts[:, None] + np.arange(self.context_length))[filled]]
        return rows


def find_or_store(
    prepared: Path,
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    encode: CaptionTokenizer,
    *,
    say: Callable[[str], None],
) -> StoredTokens:
    """Returns the tokens of all captions of the records, computing and storing them first if there are none.

    They are stored in the dataset's folder under a hash of all that they depend on (`settings`), so they are never out
    of date. One process per machine computes them, the first of several machines before the others; memory does not
    depend on the number of records.

    Args:
      encode: tokenizes the captions; its result must be that of `text.encode`.
      say: prints a line for the user.

    Raises:
      OSError: the folder cannot be written.
      UserError: the stored files are incomplete.
    """
    facts = settings(prepared, records, tokenizer, preprocess)
    folder = prepared / FOLDER / files.fingerprint(facts)

    def write() -> None:
        say(f"tokenizing the captions of {len(records):,} products once, into {folder}")
        _write(folder, records, tokenizer, preprocess, encode, facts)

    def find_or_write() -> None:
        folders.make_once((folder / SETTINGS).exists, write, folder.parent, "tokenizes captions", say)

    def first() -> str:
        try:
            find_or_write()
        except OSError as error:
            return str(error)
        return ""

    if problem := distributed.broadcast("tokens", first):
        raise OSError(problem)
    find_or_write()  # a machine may have a copy of the dataset of its own
    return StoredTokens(folder)


def settings(
    prepared: Path, records: Records, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess
) -> dict[str, Any]:
    """Returns everything on which the tokens of the records' captions depend, as JSON values."""
    return {
        "data_fingerprint": data_fingerprint(prepared),
        "split": records.split,
        "records": hashlib.sha256(np.ascontiguousarray(records.numbers, "<i8").tobytes()).hexdigest(),
        "caption_template": preprocess.caption_template,
        "lowercase": preprocess.lowercase,
        "context_length": preprocess.context_length,
        "tokenizer": _content(tokenizer),
        "rules": RULES,
        "libraries": [tokenizers.__version__, transformers.__version__, unicodedata.unidata_version],
    }


def unchanged_captions(
    blocks: Iterable[tuple[list[bytes], np.ndarray, list[bytes]]], preprocess: Preprocess
) -> Iterator[tuple[list[str], Int[np.ndarray, " n"]]]:
    """Yields the captions that training uses if it does not augment them, for each of the `blocks` of `Records.texts`.

    Each item is (the captions of the block's records, the number of captions of each record).
    """
    for names, counts, attributes in blocks:
        values = [one for one, count in zip(attributes, counts.tolist(), strict=True) for _ in range(count)]
        draws = np.zeros((len(names), text.MAX_DRAWS), np.float32)
        yield text.augmented_captions(names, values, preprocess, UNCHANGED, draws), counts


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a tokenizer's content, without the truncation and padding that its last use left in it."""
    ends = [tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.truncation_side]
    digest = hashlib.sha256(json.dumps([type(tokenizer).__name__, *ends]).encode())
    with tempfile.TemporaryDirectory() as name:
        text.save_tokenizer(tokenizer, Path(name))
        kept = ("tokenizer.json",) if tokenizer.is_fast else tuple(sorted(path.name for path in Path(name).iterdir()))
        for file in kept:
            digest.update((Path(name) / file).read_bytes())
    return digest.hexdigest()


def _write(
    folder: Path,
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    preprocess: Preprocess,
    encode: CaptionTokenizer,
    facts: dict[str, Any],
) -> None:
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<i4"
    captions = tokens = 0
    with files.atomically(folder) as temporary, ExitStack() as stack:
        temporary.mkdir()
        token_file, end_file, first_file = (
            stack.enter_context((temporary / name).open("wb")) for name in (TOKENS, ENDS, FIRSTS)
        )
        first_file.write(np.zeros(1, "<i8").tobytes())
        progress = stack.enter_context(bar(total=len(records), desc="tokenizing captions", unit="product"))
        blocks = prefetch(records.texts(), lambda block: block, ahead=1)
        for texts, counts in unchanged_captions(blocks, preprocess):
            rows = encode(texts)
            used = rows.shape[1] - np.argmax(rows[:, ::-1] != tokenizer.pad_token_id, axis=1)
            used[(rows == tokenizer.pad_token_id).all(axis=1)] = 0
            token_file.write(rows[np.arange(rows.shape[1]) < used[:, None]].astype(dtype).tobytes())
            end_file.write((tokens + np.cumsum(used)).astype("<i8").tobytes())
            first_file.write((captions + np.cumsum(counts)).astype("<i8").tobytes())
            captions, tokens = captions + len(texts), tokens + int(used.sum())
            progress.update(len(counts))
        token_file.write(np.zeros(1, dtype).tobytes())  # an empty file could not be mapped
        sizes = {TOKENS: token_file.tell(), ENDS: end_file.tell(), FIRSTS: first_file.tell()}
        layout = {"dtype": dtype, "padding": tokenizer.pad_token_id, "bytes": sizes}
        stack.close()
        files.write_json(temporary / SETTINGS, facts | layout)


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if not path.exists() or path.stat().st_size != size:
        raise UserError(f"{path} is not complete: delete {path.parent}, and the next training writes it again")
    return np.memmap(path, dtype, "r")
