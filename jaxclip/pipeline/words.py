"""Tokenizes captions word by word: each word is cut into tokens once, and captions join the tokens of their words."""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from jaxclip.pipeline import text

MAX_WORDS = 1 << 19
"""Words kept in memory, about 100 MB; when there are more, all are forgotten and cut again."""
SAMPLES = 256  # captions that must have the same tokens in both ways before captions are tokenized word by word
ANCHOR = "shirt"
"""A word next to which each new word is tokenized, to find out whether its tokens depend on its neighbours."""
SPLITTERS = ("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Metaspace")
"""Pre-tokenizers that never put two words that white space separates into one piece (see `_splits_words`)."""
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
NORMALIZERS = (
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Lowercase",
    "StripAccents",
    "BertNormalizer",
    "Strip",
    "Precompiled",
)
"""Normalizers that change characters regardless of the words around them, except where white space results."""
REPLACED = (r"\s+", " {2,}", text.PUNCTUATION)
"""Regular expressions whose replacement does not reach from one word into the next, except for white space."""


class TokenizedByCaption:
    """Tokenizes each caption as a whole.

    Attributes:
      reason: why captions are not tokenized word by word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int, reason: str = ""):
        self.tokenizer, self.context_length, self.reason = tokenizer, context_length, reason

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n T"]:
        """Returns the token ids of the texts, as `text.encode` does."""
        return text.encode(self.tokenizer, texts, self.context_length)


@dataclass
class _Words:
    """The tokens of the words seen so far, back to back.

    A word has one number where a text begins with it and one elsewhere, equal if its tokens are. Number 0 stands for
    all words whose tokens depend on their neighbours.
    """

    first: dict[str, int] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def add(self, pieces: Sequence[Sequence[int]]) -> None:
        """Appends the tokens of words, whose numbers follow the last one."""
        counts = np.fromiter(map(len, pieces), np.int32, len(pieces))
        starts = len(self.tokens) + np.cumsum(counts, dtype=np.int32) - counts
        tokens = np.fromiter(chain.from_iterable(pieces), np.int32, counts.sum())
        self.starts, self.counts = np.append(self.starts, starts), np.append(self.counts, counts)
        self.tokens = np.append(self.tokens, tokens)


class TokenizedByWord:
    """Tokenizes captions by joining the tokens of their words; the result equals `text.encode` for every text.

    Texts that have a word whose tokens depend on its neighbours, or white space other than single spaces between words,
    are tokenized as a whole. Threads may share an object. `caption_tokenizer` says for which tokenizers it is right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int):
        self._whole = TokenizedByCaption(tokenizer, context_length)
        self._backend = _without_padding(tokenizer)
        self._added = set(self._backend.get_added_tokens_decoder())
        self._before, self._after = _ends(self._backend)
        self._padding, self._length = tokenizer.pad_token_id, context_length
        self._lock, self._words = threading.Lock(), _Words()

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n T"]:
        """Returns the token ids of the texts, (n, context_length) int32, as `text.encode` does."""
        rows = [caption.split(" ") for caption in texts]
        with self._lock:
            if len(self._words.first) > MAX_WORDS:
                self._words = _Words()
            words = self._words
            self._learn(words, {word for row in rows for word in row} - words.first.keys())
            numbers = np.asarray([words.later[word] for row in rows for word in row], np.int64)
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            numbers[np.cumsum(lengths) - lengths] = [words.first[row[0]] for row in rows]
            starts, counts, tokens = words.starts, words.counts, words.tokens
        owners = np.repeat(np.arange(len(rows)), lengths)
        count = counts[numbers]
        source = np.arange(count.sum()) + np.repeat(starts[numbers] - (np.cumsum(count) - count), count)
        joined = self._padded(tokens[source], np.repeat(owners, count), len(rows))
        whole = np.unique(owners[numbers == 0])
        if len(whole):
            joined[whole] = self._whole([texts[row] for row in whole])
        return joined

    def _padded(self, tokens: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
        """Returns `size` rows with the tokens of each, truncated and padded; `owners`: the row of each token."""
        totals = np.bincount(owners, minlength=size)
        position = np.arange(len(owners)) - np.repeat(np.cumsum(totals) - totals, totals)
        before, room = len(self._before), self._length - len(self._before) - len(self._after)
        fits = position < room
        rows = np.full((size, self._length), self._padding, np.int32)
        rows[:, :before] = self._before
        rows[owners[fits], before + position[fits]] = tokens[fits]
        end = before + np.minimum(totals, room)
        rows[np.arange(size)[:, None], end[:, None] + np.arange(len(self._after))] = self._after
        return rows

    def _learn(self, words: _Words, new: set[str]) -> None:
        """Cuts new words into tokens: alone, and before, after and between other words, where they must be the same."""
        if not new:
            return
        (anchor,), (both,) = self._encode([ANCHOR]), self._encode([f"{ANCHOR} {ANCHOR}"])
        next_anchor = both[len(anchor) :]
        ordered, pieces = sorted(new), []
        sides = (("", ""), ("", f" {ANCHOR}"), (f"{ANCHOR} ", ""), (f"{ANCHOR} ", f" {ANCHOR}"))
        forms = [self._encode([left + word + right for word in ordered]) for left, right in sides]

        def number(tokens: list[int]) -> int:
            pieces.append(tokens)
            return len(words.starts) + len(pieces) - 1

        for word, alone, begins, ends, between in zip(ordered, *forms, strict=True):
            later = ends[len(anchor) :]
            independent = (
                word.split() == [word]
                and begins == alone + next_anchor
                and ends == anchor + later
                and between == anchor + later + next_anchor
                and self._added.isdisjoint(alone)
            )
            words.first[word] = number(alone) if independent else 0
            words.later[word] = words.first[word] if later == alone or not independent else number(later)
        words.add(pieces)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


CaptionTokenizer = TokenizedByCaption | TokenizedByWord


def caption_tokenizer(
    tokenizer: PreTrainedTokenizerBase, context_length: int, samples: Iterable[str]
) -> CaptionTokenizer:
    """Returns the faster way to tokenize captions that gives the same tokens as `text.encode`.

    Captions are tokenized word by word if the tokenizer splits texts at white space before anything else, and if the
    first SAMPLES of `samples` get the same tokens in both ways. A `TokenizedByCaption` has the reason why not.
    """
    whole = TokenizedByCaption(tokenizer, context_length, _obstacle(tokenizer))
    if whole.reason:
        return whole
    by_word = TokenizedByWord(tokenizer, context_length)
    captions = [*dict.fromkeys(" ".join(caption.split()) for caption in islice(samples, SAMPLES))]
    if not captions:
        return by_word
    different = np.flatnonzero((by_word(captions) != whole(captions)).any(axis=1))
    if len(different):
        reason = f"the tokens of {captions[different[0]]!r} are not those of its words"
        return TokenizedByCaption(tokenizer, context_length, reason)
    return by_word


def _obstacle(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns why the tokens of a caption may not be those of its words; "" if nothing is known against it."""
    if not tokenizer.is_fast:
        return f"a {type(tokenizer).__name__} is implemented in Python"
    try:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # the tokenizers library raises Exception itself
        return "a part of the tokenizer is implemented in Python"
    if tokenizer.padding_side != "right" or tokenizer.truncation_side != "right":
        return "the tokenizer pads or truncates on the left"
    if backend["model"].get("dropout"):
        return "the tokenizer draws random tokens (dropout)"
    if any(word.split() != [word] for token in backend["added_tokens"] for word in [token["content"]]):
        return "the tokenizer has a special token with white space"
    if not any(map(_splits_words, _steps(backend["pre_tokenizer"], "pretokenizers"))):
        return "the tokenizer does not split captions at white space"
    if not all(map(_stays_in_words, _steps(backend["normalizer"], "normalizers"))):
        return "a normalizer of the tokenizer may reach across words"
    if _ends(_without_padding(tokenizer)) is None:
        return "the tokenizer does not only add tokens at the ends of a caption"
    return ""


def _splits_words(step: Mapping[str, Any]) -> bool:
    kind = step["type"]
    if kind == "Split":
        return (
            step["behavior"] == "Removed" and step["invert"] and step["pattern"].get("Regex", "").endswith(CLIP_WORDS)
        )
    return kind in SPLITTERS and step.get("use_regex", True) and step.get("split", True)


def _stays_in_words(step: Mapping[str, Any]) -> bool:
    if step["type"] != "Replace":
        return step["type"] in NORMALIZERS
    (kind, pattern), *_ = step["pattern"].items()
    return pattern in REPLACED if kind == "Regex" else pattern.split() == [pattern]


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a pre-tokenizer or normalizer of a tokenizer.json, without nested sequences."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _without_padding(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns a copy of the tokenizer's back end that neither truncates nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ends(backend: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Returns the tokens that the tokenizer puts before and after a text; None if it changes the text's own tokens."""
    bare = backend.encode(ANCHOR, add_special_tokens=False).ids
    whole = backend.encode(ANCHOR).ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return None
