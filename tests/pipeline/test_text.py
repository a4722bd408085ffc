"""Any caption is tokenized with an end token; training leaves out attributes and words at random, never all words."""

import json
import string
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from jaxclip.catalog import captions
from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.text import END, MAX_DRAWS, START

PREPROCESS = Preprocess(32, "squash", (0.5,) * 3, (0.25,) * 3, "{name} in {colour}, {season}", True, 16)
TOKENIZER = text.train_tokenizer(["a cotton shirt in blue", "a silk shirt in red", "Schöne Hemden aus 棉"], 320)
ATTRIBUTES = {"colour": "Blue", "season": "Winter", "usage": "Casual"}


def draws_of(seed):
    return np.random.default_rng(seed).random(MAX_DRAWS, np.float32)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60).filter(lambda t: START not in t and END not in t))
def test_tokens_decode_to_the_original_text(value):
    (tokens,) = text.encode(TOKENIZER, [value], 300)
    assert tokens[0] == TOKENIZER.bos_token_id and TOKENIZER.eos_token_id in tokens
    decoded = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert decoded in (value, f" {value}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=4), st.integers(4, 24))
def test_every_row_has_start_and_end_tokens_at_any_text_length(values, length):
    tokens = text.encode(TOKENIZER, values, length)
    assert tokens.shape == (len(values), length) and tokens.dtype == np.int32
    assert (tokens[:, 0] == TOKENIZER.bos_token_id).all()
    assert (tokens[:, -1] == TOKENIZER.eos_token_id).all()  # the end itself or the padding, which is the same token
    assert (tokens < len(TOKENIZER)).all()


def test_a_caption_that_is_too_long_is_truncated_before_its_end_token():
    long, short = text.encode(TOKENIZER, ["shirt " * 50, "shirt"], 8)
    assert list(long == TOKENIZER.eos_token_id) == [False] * 7 + [True]
    assert np.argmax(short == TOKENIZER.eos_token_id) == len(TOKENIZER("shirt")["input_ids"]) - 1


def test_the_vocabulary_has_at_most_the_requested_size_and_starts_with_the_special_tokens():
    assert len(TOKENIZER) <= 320
    assert TOKENIZER.convert_tokens_to_ids([START, END]) == [0, 1]


def test_the_same_drawngive_the_same_tokenizer():
    texts = [f"item {n % 7} shirt {n}" for n in range(50)]
    first, second = (text.train_tokenizer(texts, 300).get_vocab() for _ in range(2))
    assert first == second


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    loaded = text.load_tokenizer(tmp_path / "tokenizer")
    values = ["a cotton shirt", "Ünïcode 棉 🧥", "", "word " * 40]
    np.testing.assert_array_equal(text.encode(loaded, values, 12), text.encode(TOKENIZER, values, 12))
    assert len(loaded) == len(TOKENIZER) and loaded.eos_token_id == TOKENIZER.eos_token_id


def t5(folder):
    """Writes a tokenizer of single characters; its class is the one named by SigLIP checkpoints for open_clip."""
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation + "▁"]
    model = models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], unk_id=2)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "T5Tokenizer"}))
    return folder


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """A T5 tokenizer, and the same tokenizer with canonicalization, saved and loaded."""
    folder = t5(tmp_path_factory.mktemp("t5"))
    cleaned = text.add_cleaning(text.load_tokenizer(folder), "canonicalize")
    text.save_tokenizer(cleaned, folder / "canonical")
    return text.load_tokenizer(folder), text.load_tokenizer(folder / "canonical")


@given(st.text(st.sampled_from(string.printable + "ÄÖüßé’“"), max_size=40))
def test_a_reloaded_tokenizer_canonicalizes_drawnas_big_vision_does(canonical, value):
    plain, cleaned = canonical
    expected = value.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    expected = text.encode(plain, [" ".join(expected.split())], 64)
    np.testing.assert_array_equal(text.encode(cleaned, [value], 64), expected)


def test_cleaning_lower_only_lowercases_and_whitespace_changes_nothing(tmp_path):
    plain = text.load_tokenizer(t5(tmp_path))
    assert text.add_cleaning(plain, "whitespace") is plain
    expected = text.encode(plain, ["red T.shirt", "red t.shirt"], 16)
    lower = text.add_cleaning(plain, "lower")
    np.testing.assert_array_equal(text.encode(lower, ["Red T.SHIRT"], 16), expected[1:])
    assert (lower.eos_token_id, lower.pad_token_id, lower.model_max_length) == (1, 1, 64)


def test_a_tokenizer_that_does_not_end_drawnis_refused(tmp_path):
    endless = PreTrainedTokenizerFast(
        tokenizer_object=type(TOKENIZER.backend_tokenizer).from_str(TOKENIZER.backend_tokenizer.to_str()),
        bos_token=START,
        eos_token=END,
    )
    endless.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, 0)]
    )
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="does not put an end token after a caption"):
        text.load_tokenizer(tmp_path / "endless")


def test_a_tokenizer_without_any_end_token_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="does not put an end token after a caption"):
        text.load_tokenizer(tmp_path / "bare")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="has no Hugging Face tokenizer"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no Hugging Face tokenizer"):
        text.load_tokenizer(tmp_path / "absent")


def test_evaluation_uses_the_whole_caption_template():
    assert text.caption("Puma  Shirt", ATTRIBUTES, PREPROCESS) == "puma shirt in blue, winter"
    kept_case = replace(PREPROCESS, lowercase=False)
    assert text.caption("Puma Shirt", ATTRIBUTES, kept_case) == "Puma Shirt in Blue, Winter"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_keeping_everything_gives_the_evaluation_caption(seed):
    kept = text.augmented_caption(
        "Puma Shirt",
        ATTRIBUTES,
        PREPROCESS,
        Augmentation(keep_attributes=1, keep_words=1, prompts=False),
        draws_of(seed),
    )
    assert kept == text.caption("Puma Shirt", ATTRIBUTES, PREPROCESS)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_keeping_no_attribute_leaves_the_name(seed):
    bare = text.augmented_caption(
        "Puma Shirt",
        ATTRIBUTES,
        PREPROCESS,
        Augmentation(keep_attributes=0, keep_words=1, prompts=False),
        draws_of(seed),
    )
    assert not {"blue", "winter"} & set(bare.replace(",", " ").split())
    assert bare.startswith("puma shirt")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]), st.integers(1, 60))
def test_a_caption_keeps_at_least_one_word_of_its_name_and_their_order(seed, keep, count):
    name = [f"word{index}" for index in range(count)]
    template = replace(PREPROCESS, caption_template="{name}")
    words = text.augmented_caption(
        " ".join(name), {}, template, Augmentation(keep_attributes=1, keep_words=keep, prompts=False), draws_of(seed)
    ).split()
    assert words and words == [word for word in name if word in words]


def test_attributes_and_words_are_kept_with_the_configured_probability():
    settings = Augmentation(keep_attributes=0.7, keep_words=0.4, prompts=False)
    template = replace(PREPROCESS, caption_template="{name} {colour}")
    drawn = [
        text.augmented_caption("one two three four five", ATTRIBUTES, template, settings, draws_of(seed)).split()
        for seed in range(600)
    ]
    assert abs(np.mean(["blue" in words for words in drawn]) - 0.7) < 0.06
    # All five words are dropped in 0.6^5 = 8 % of the captions, which then keep one.
    assert abs(np.mean([len([w for w in words if w != "blue"]) for words in drawn]) - 2.08) < 0.15


def test_augmentation_draws_every_prompt_of_openfashionclip():
    settings = Augmentation(keep_attributes=1, keep_words=1, prompts=True)
    drawn = {text.augmented_caption("shirt", ATTRIBUTES, PREPROCESS, settings, draws_of(seed)) for seed in range(300)}
    assert drawn == {prompt.format(name="shirt") for prompt in captions.PROMPTS}


def test_the_captions_of_a_batch_are_augmented_as_its_rows_are_one_by_one():
    draws = np.stack([draws_of(seed) for seed in range(20)])
    settings = Augmentation(keep_attributes=0.5, keep_words=0.5, prompts=False)
    names = [b"Puma Shirt", "Hemd für Männer".encode()] * 10
    values = [b'{"colour": "Blue"}', b"{}"] * 10
    assert text.augmented_captions(names, values, PREPROCESS, settings, draws) == [
        text.augmented_caption(name.decode(), json.loads(value), PREPROCESS, settings, row)
        for name, value, row in zip(names, values, draws, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc shirt", max_size=60), min_size=1, max_size=4), st.integers(4, 12), st.integers(1, 9))
def test_the_segments_of_a_caption_concatenate_to_its_tokens(values, length, limit):
    segments = text.segments(TOKENIZER, values, length, limit)
    assert segments.ids.shape == (len(segments.owners), length) and segments.ids.dtype == np.int32
    assert (segments.ids[:, 0] == TOKENIZER.bos_token_id).all() and (np.diff(segments.owners) >= 0).all()
    for number, whole in enumerate(TOKENIZER(values)["input_ids"]):
        parts = zip(segments.ids[segments.owners == number], segments.lengths[segments.owners == number], strict=True)
        inside = [token for part, size in parts for token in part[1 : size - 1].tolist()]
        assert inside == whole[1:-1][: limit * (length - 2)]
    first = np.unique(segments.owners, return_index=True)[1]
    np.testing.assert_array_equal(segments.ids[first], text.encode(TOKENIZER, values, length))
