"""Stored tokens and words give the batches of captions tokenized as a whole; no stored token is out of date."""

import csv
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxclip.catalog import builder
from jaxclip.config.schema import Augmentation, Config
from jaxclip.errors import UserError
from jaxclip.pipeline import text, tokens
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.words import TokenizedByCaption, TokenizedByWord, caption_tokenizer

LENGTH, TOTAL, BATCH = 16, 19, 5
PLAIN = Augmentation((1.0, 1.0), (1.0, 1.0))
AUGMENTED = [
    replace(PLAIN, keep_attributes=0.5, keep_words=0.5),
    replace(PLAIN, keep_words=0.0),
    replace(PLAIN, prompts=True, keep_words=0.8),
]


@pytest.fixture(scope="module")
def several(raw, tmp_path_factory):
    """The prepared catalogue, in which a product has one to four captions, some too long for the context."""
    folder, prepared = tmp_path_factory.mktemp("several"), tmp_path_factory.mktemp("prepared") / "several"
    shutil.copytree(raw, folder, dirs_exist_ok=True)
    with (raw / "products.csv").open() as file:
        (head, *rows) = csv.reader(file)
    with (folder / "products.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
        for number, (ident, image, caption, category, colour) in enumerate(rows):
            for extra in range(number % 4):
                changed = f"{caption}, version {extra}: Größe {'XL ' * 4 * extra}<|endoftext|>"
                csv.writer(file).writerow([ident, image, changed, category, colour])
    source = builder.Source("table", folder / "products.csv", 24 - TOTAL, 0, {})
    builder.prepare(source, prepared, progress=lambda items, **_: items)
    return prepared


def store(prepared, records, tokenizer, preprocess, *, encode=None, said=None):
    encode = encode or caption_tokenizer(tokenizer, preprocess.context_length, [])
    lines = [] if said is None else said
    return tokens.find_or_store(prepared, records, tokenizer, preprocess, encode, say=lines.append)


def load(records, captions, preprocess, augmentation, first, last, *, partners=None, rows=None):
    config = Config(seed=3, batch_size=BATCH, augmentation=augmentation)
    steps = range(first, last)
    return list(training_batches(records, captions, preprocess, config, partners, steps=steps, rows=rows))


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def partners_of(total):
    partner = (np.arange(total) + 7) % total
    partner[[2, 5]] = -1
    return Partners(partner, np.linspace(-0.5, 0.5, total).astype(np.float32))


@pytest.mark.parametrize("with_partners", [False, True])
def test_stored_tokens_give_the_batches_of_captions_tokenized_in_every_step(
    several, preprocess, tokenizer, with_partners, monkeypatch
):
    records = Records(several, "train").take(np.random.default_rng(0).permutation(TOTAL)[:13])
    stored, whole = store(several, records, tokenizer, preprocess), TokenizedByCaption(tokenizer, LENGTH)
    assert len(stored) == 13 and stored.counts(np.arange(13)).max() == 4
    partners = partners_of(13) if with_partners else None
    expected = load(records, whole, preprocess, PLAIN, 0, 12, partners=partners)
    assert len({row.tobytes() for batch in expected for row in batch["text"]}) > 20  # not only one caption per product
    read, read_all = [], Records.read
    monkeypatch.setattr(Records, "read", lambda self, numbers: read.extend(numbers) or read_all(self, numbers))
    assert_same(load(records, stored, preprocess, PLAIN, 0, 12, partners=partners), expected)
    assert len(read) == 12 * BATCH  # the records of partners are not read
    assert_same(load(records, stored, preprocess, PLAIN, 7, 12, partners=partners), expected[7:])
    rows = np.asarray([1, 4])
    part = load(records, stored, preprocess, PLAIN, 3, 6, partners=partners, rows=rows)
    assert_same(part, [{name: values[rows] for name, values in batch.items()} for batch in expected[3:6]])


def test_stored_tokens_of_other_records_or_for_augmented_captions_are_refused(several, preprocess, tokenizer):
    records = Records(several, "train")
    stored = store(several, records, tokenizer, preprocess)
    for arguments in (
        (records.take(np.arange(7)), stored, preprocess, PLAIN),
        (records, stored, replace(preprocess, context_length=8), PLAIN),
        (records, stored, preprocess, AUGMENTED[0]),
    ):
        with pytest.raises(ValueError, match="records, context length and augmentation of the tokens are"):
            load(*arguments, 0, 1)


@pytest.mark.parametrize("augmentation", AUGMENTED)
def test_words_give_the_batches_of_captions_tokenized_as_a_whole(several, preprocess, tokenizer, augmentation):
    records, partners = Records(several, "train"), partners_of(TOTAL)
    by_word = caption_tokenizer(tokenizer, LENGTH, [])
    assert isinstance(by_word, TokenizedByWord)
    expected = load(records, TokenizedByCaption(tokenizer, LENGTH), preprocess, augmentation, 0, 12, partners=partners)
    assert_same(load(records, by_word, preprocess, augmentation, 0, 12, partners=partners), expected)
    assert_same(load(records, by_word, preprocess, augmentation, 9, 12, partners=partners), expected[9:])


def fail(texts):
    raise AssertionError("tokenized again")


def test_tokens_are_computed_once_and_again_for_whatever_changes_them(several, preprocess, tokenizer, monkeypatch):
    records, said, preprocess = Records(several, "train"), [], replace(preprocess, context_length=18)
    store(several, records, tokenizer, preprocess, said=said)
    text.encode(tokenizer, ["shirt"], 4)  # leaves other padding in the tokenizer
    store(several, Records(several, "train"), tokenizer, preprocess, encode=fail, said=said)
    store(several, records, text.load_tokenizer(saved(tokenizer, several.parent)), preprocess, encode=fail, said=said)
    assert len(said) == 1 and said[0].startswith("tokenizing the captions of 19 products once, into ")
    facts = tokens.settings(several, records, tokenizer, preprocess)
    other_tokenizer = text.train_tokenizer([f"item {n} silk shirt shade{n}" for n in range(24)], 300)
    padded = text.train_tokenizer([f"item {n} cotton shirt shade{n}" for n in range(24)], 300)
    padded.padding_side = "left"
    for change in (
        {"records": records.take(np.arange(5))},
        {"records": records.take(np.arange(TOTAL)[::-1])},
        {"records": Records(several, "test")},
        {"tokenizer": other_tokenizer},
        {"tokenizer": padded},
        {"preprocess": replace(preprocess, caption_template="{colour} {name}")},
        {"preprocess": replace(preprocess, lowercase=False)},
        {"preprocess": replace(preprocess, context_length=15)},
    ):
        arguments = {"records": records, "tokenizer": tokenizer, "preprocess": preprocess} | change
        assert tokens.settings(several, **arguments) != facts, change
        with pytest.raises(AssertionError, match="tokenized again"):
            store(several, encode=fail, **arguments)
    for name, module in (("RULES", tokens), ("__version__", tokens.tokenizers), ("__version__", tokens.transformers)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0")
            assert tokens.settings(several, records, tokenizer, preprocess) != facts
    other = replace(preprocess, image_size=64)  # does not change tokens
    assert tokens.settings(several, records, tokenizer, other) == facts


def saved(tokenizer, folder):
    text.save_tokenizer(tokenizer, folder / "tokenizer")
    return folder / "tokenizer"


def test_the_tokens_of_this_version_of_the_rules_are_known():
    """If this fails because captions or tokens are built in another way, raise `tokens.RULES` and record new ids."""
    words = ["[S]", "[E]", "red", "shirt", "in", "cotton", ",", "blue"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[E]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[S] $A [E]", special_tokens=[("[S]", 0), ("[E]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]", pad_token="[E]")
    template = "{name} in {colour}, {fabric} {pattern}"
    preprocess = Preprocess(32, "squash", (0.5,) * 3, (0.5,) * 3, template, True, 8)
    values = b'{"colour": "Blue red", "fabric": "RED Cotton"}', b'{"fabric": "Red"}'
    draws = np.zeros((2, text.MAX_DRAWS), np.float32)
    texts = text.augmented_captions([b"Red  SHIRT", b"shirt"], values, preprocess, tokens.UNCHANGED, draws)
    assert tokens.RULES == 1
    for encode in (caption_tokenizer(tokenizer, 8, []), TokenizedByCaption(tokenizer, 8)):
        assert encode(texts).tolist() == [[0, 2, 3, 4, 7, 6, 5, 1], [0, 3, 4, 2, 1, 1, 1, 1]]


def test_an_interrupted_run_leaves_nothing_and_the_next_one_stores_all(several, preprocess, tokenizer):
    records, encode = Records(several, "train"), caption_tokenizer(tokenizer, 12, [])
    shorter = replace(preprocess, context_length=12)
    folder = several / tokens.FOLDER / tokens.files.fingerprint(tokens.settings(several, records, tokenizer, shorter))

    def interrupted(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(several, records, tokenizer, shorter, encode=interrupted)
    assert not folder.exists() and not list(several.glob(f"{tokens.FOLDER}/.*"))
    stored = store(several, records, tokenizer, shorter, encode=encode)
    (folder / "ends.bin").write_bytes((folder / "ends.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"ends\.bin is not complete: delete .*, and the next training writes it again"):
        store(several, records, tokenizer, shorter, encode=encode)
    assert stored.context_length == 12


def test_runs_that_start_together_tokenize_once(several, preprocess, tokenizer):
    records, calls = Records(several, "train"), []
    longer = replace(preprocess, context_length=20)
    whole = TokenizedByCaption(tokenizer, 20)

    def encode(texts):
        calls.append(len(texts))
        return whole(texts)

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(store, several, records, tokenizer, longer, encode=encode) for _ in range(4)]
        stored = [future.result() for future in done]
    assert len(calls) == 1
    first = stored[0].read(np.arange(TOTAL), np.zeros(TOTAL, int))
    assert all((other.read(np.arange(TOTAL), np.zeros(TOTAL, int)) == first).all() for other in stored[1:])


@pytest.mark.parametrize(("vocabulary", "bytes_per_token"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_two_bytes_if_all_fit_and_padding_takes_none(several, preprocess, vocabulary, bytes_per_token):
    names = [f"shade{number}" for number in range(24)]
    filler = [f"w{number}" for number in range(vocabulary - 2 - len(names))]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[E]", "[U]", *filler, *names])}, "[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("$A [E]", special_tokens=[("[E]", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[E]", pad_token="[E]", unk_token="[U]")
    records, bare = Records(several, "train"), replace(preprocess, caption_template="{colour} {name}", context_length=4)
    stored = store(several, records, tokenizer, bare)
    rows = stored.read(np.arange(TOTAL), stored.counts(np.arange(TOTAL)) - 1)
    assert (rows[:, 0] > vocabulary - 25).all() and rows.dtype == np.int32
    expected = [texts[-1] for texts in product_captions(records, bare)]
    np.testing.assert_array_equal(rows, text.encode(tokenizer, expected, 4))
    assert stored._tokens.itemsize == bytes_per_token
    captions = int(stored.counts(np.arange(TOTAL)).sum())
    assert len(stored._tokens) == 3 * captions + 1  # four tokens, of which the last one is also the padding


def product_captions(records, preprocess):
    for product, _ in records.products():
        yield [text.caption(name, product.attributes, preprocess) for name in product.captions]
