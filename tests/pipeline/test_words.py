"""Captions tokenized word by word have the tokens of the whole caption, or are tokenized as a whole."""

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from jaxclip.pipeline import text, words
from jaxclip.pipeline.clip_tokenizer import _bytes
from jaxclip.pipeline.text import END, START
from jaxclip.pipeline.words import TokenizedByCaption, TokenizedByWord, caption_tokenizer

CAPTIONS = [
    "a cotton shirt, blue (men's)",
    "don't touch: 100% SILK dress 2024!",
    "Schöne Hemden aus 棉 🧥 naïve café",
    "the  red_shirt's collar",
]
LETTERS = string.ascii_lowercase + string.digits + string.punctuation + "▁"
SPECIAL = {START: 0, END: 1}
ENDS = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=list(SPECIAL.items()))


def wrapped(backend, ends=ENDS, **settings):
    backend.post_processor = ends
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=END, unk_token="<unk>", **settings
    )


def byte_level(prefix_space=False, normalizer=None, dropout=None):
    backend = Tokenizer(models.BPE(dropout=dropout))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[START, END, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    return wrapped(backend)


def clip():
    symbols = [*_bytes()]
    merges = [("s", "h"), ("i", "r"), ("ir", "t</w>"), ("sh", "irt</w>"), ("e", "d</w>"), ("Ã", "©</w>")]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def bert():
    pieces = ["shirt", "##s", "##t", *string.ascii_lowercase, *(f"##{letter}" for letter in LETTERS), *LETTERS]
    vocabulary = [START, END, "<unk>", *dict.fromkeys(pieces)]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return wrapped(backend)


def unigram(pre_tokenizer, normalizer=None, **settings):
    pieces = [(START, 0.0), (END, 0.0), ("<unk>", -9.0), ("▁shirt", -2.0), ("t▁r", -1.0), ("ed", -2.5)]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in LETTERS)], unk_id=2))
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    return wrapped(backend, **settings)


CANONICAL = normalizers.Sequence(
    [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(text.PUNCTUATION), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
)
BY_WORD = {
    "ours": lambda: text.train_tokenizer(CAPTIONS, 320),
    "byte level, no space before the text": byte_level,
    "byte level, NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "byte level, spaces stripped": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.Nmt(), normalizers.Strip()])
    ),
    "CLIP's": clip,
    "BERT's": bert,
    "SentencePiece": lambda: unigram(pre_tokenizers.Metaspace()),
    "SentencePiece, canonicalized": lambda: unigram(pre_tokenizers.Metaspace(), CANONICAL),
    "SentencePiece, only the first word without a space": lambda: unigram(
        pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    ),
}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(f"a shirt red's t's 12-x _ - ¨ \u200b é {START} {END} <unk> x{END}y".split(" ")), max_size=30
    ).map(" ".join),
    st.text(st.sampled_from(" \t\x1c\u00a0\u180e\u200b\u0301'sSİΣ¨_-t9棉🧥"), max_size=30),
)


@pytest.fixture(scope="module", params=BY_WORD)
def both(request):
    """A tokenizer, and by context length what tokenizes captions by their words."""
    tokenizer = BY_WORD[request.param]()
    return tokenizer, {length: caption_tokenizer(tokenizer, length, CAPTIONS) for length in (3, 8, 24)}


@settings(max_examples=60, deadline=None)
@given(values=st.lists(TEXTS, min_size=1, max_size=5), length=st.sampled_from([3, 8, 24]))
def test_the_tokens_of_a_caption_are_those_of_its_words(both, values, length):
    tokenizer, by_word = both
    assert isinstance(by_word[length], TokenizedByWord)
    values += [" ".join(value.split()) for value in values]
    expected = text.encode(tokenizer, values, length)
    for _ in range(2):  # the second time, all words are known
        actual = by_word[length](values)
        assert actual.dtype == np.int32
        np.testing.assert_array_equal(actual, expected)


def test_only_texts_with_unusual_words_are_tokenized_as_a_whole(monkeypatch):
    tokenizer, whole = text.train_tokenizer(CAPTIONS, 320), []
    by_word = caption_tokenizer(tokenizer, 16, [])
    encode = text.encode
    monkeypatch.setattr(
        text, "encode", lambda tokenizer, texts, length: whole.extend(texts) or encode(tokenizer, texts, length)
    )
    by_word(["a cotton shirt", f"red{END} shirt", "two  spaces", "", "blue 棉 🧥"])
    assert whole == [f"red{END} shirt", "two  spaces", ""]


def test_known_words_are_not_tokenized_again(monkeypatch):
    by_word = caption_tokenizer(clip(), 16, [])
    expected = by_word(["red shirt", "shirt red's"])
    monkeypatch.setattr(by_word, "_encode", None)
    np.testing.assert_array_equal(by_word(["red shirt", "shirt red's"]), expected)
    np.testing.assert_array_equal(by_word(["shirt red"]), text.encode(clip(), ["shirt red"], 16))


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 20)
    tokenizer = clip()
    by_word = caption_tokenizer(tokenizer, 16, [])
    for start in range(0, 200, 10):
        values = [f"shirt{number} red" for number in range(start, start + 10)]
        np.testing.assert_array_equal(by_word(values), text.encode(tokenizer, values, 16))
        assert len(by_word._words.first) <= 31


def with_token(tokenizer, content):
    tokenizer.add_tokens([content])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: unigram(None), "does not split captions at white space"),
        (lambda: unigram(pre_tokenizers.Metaspace(split=False)), "does not split captions at white space"),
        (lambda: unigram(pre_tokenizers.Split(Regex(".. "), "isolated")), "does not split captions at white space"),
        (lambda: byte_level(dropout=0.1), "draws random tokens"),
        (lambda: with_token(clip(), "red shirt"), "special token with white space"),
        (lambda: byte_level(normalizer=normalizers.Replace(Regex("d s"), "x")), "may reach across words"),
        (lambda: unigram(pre_tokenizers.Metaspace(), padding_side="left"), "pads or truncates on the left"),
    ],
)
def test_tokenizers_that_look_beyond_words_tokenize_whole_captions(make, reason):
    by_caption = caption_tokenizer(make(), 16, CAPTIONS)
    assert isinstance(by_caption, TokenizedByCaption) and reason in by_caption.reason


def test_a_difference_in_the_samples_is_noticed(monkeypatch):
    """Here the rules accept a tokenizer that they should not."""
    monkeypatch.setattr(words, "_splits_words", lambda step: True)
    tokenizer = unigram(pre_tokenizers.Metaspace(split=False))
    assert isinstance(caption_tokenizer(tokenizer, 16, ["a dress"]), TokenizedByWord)
    refused = caption_tokenizer(tokenizer, 16, ["a dress", "a hat red"])
    assert isinstance(refused, TokenizedByCaption) and "'a hat red'" in refused.reason
    np.testing.assert_array_equal(refused(["a hat red"]), text.encode(tokenizer, ["a hat red"], 16))
