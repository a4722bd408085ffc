"""Tokens are stored for runs that read captions often; the bytes that devices receive are counted from real batches."""

from dataclasses import replace

import jax
import pytest

from jaxclip import config
from jaxclip.catalog import builder
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.pipeline import text, tokens
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.tokens import StoredTokens
from jaxclip.pipeline.words import TokenizedByCaption, TokenizedByWord
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training import inputs

PRODUCTS, BATCH = 40, 8
SMALL = {"steps": 9, "batch_size": BATCH, "model": {"preset": "tiny"}, "data": {"image_size": 32, "vocab_size": 400}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "shop"
    draw_catalogue(raw, PRODUCTS, 0)
    source = builder.Source("fashion_product_images", raw, 0, 0, {})
    builder.prepare(source, folder, progress=lambda items, **_: items, workers=1)
    return folder


@pytest.fixture(scope="module")
def towers(prepared):
    configuration = config.build(SMALL)
    names = [name for product, _ in Records(prepared, "all").products() for name in product.captions]
    return make_towers(configuration, make_preprocess(configuration), text.train_tokenizer(names, 400))


@pytest.fixture
def captions(prepared, towers):
    """Returns the source of a run's tokens, and what was said."""

    def choose(steps=9, augmentation=None, towers=towers):
        configuration, said = config.build({**SMALL, "augmentation": augmentation or {}}), []
        records = Records(prepared, "all")
        return inputs.caption_tokens(configuration, towers, records, prepared, steps=steps, say=said.append), said

    return choose


def test_runs_of_more_than_one_epoch_without_augmented_captions_read_stored_tokens(captions):
    short, said = captions(steps=PRODUCTS // BATCH)
    assert isinstance(short, TokenizedByWord) and not said
    stored, said = captions(steps=PRODUCTS // BATCH + 1)
    assert isinstance(stored, StoredTokens) and len(said) == 1 and "products once, into " in said[0]
    again, said = captions()
    assert isinstance(again, StoredTokens) and not said
    for augmentation in ({"keep_words": 0.9}, {"keep_attributes": 0.9}, {"prompts": True}):
        augmented, said = captions(augmentation=augmentation)
        assert isinstance(augmented, TokenizedByWord) and not said


def test_the_log_says_why_captions_are_tokenized_whole_or_not_stored(captions, towers, monkeypatch):
    whole = text.train_tokenizer(["a shirt"], 300)
    whole.backend_tokenizer.model.dropout = 0.5
    found, said = captions(steps=1, towers=replace(towers, tokenizer=whole))
    assert isinstance(found, TokenizedByCaption)
    assert said == [
        "captions are tokenized as a whole, which takes more time than word by word: the tokenizer draws random tokens "
        "(dropout)"
    ]

    def read_only(*arguments):
        raise PermissionError(13, "Permission denied", "tokens")

    monkeypatch.setattr(tokens, "_write", read_only)
    other = replace(towers, preprocess=replace(towers.preprocess, context_length=9))
    found, said = captions(towers=other)
    assert isinstance(found, TokenizedByWord)
    assert said[-1].startswith("the tokens of captions cannot be stored, and are computed in every step: [Errno 13]")


@pytest.mark.parametrize(
    ("mesh", "canvas", "copies"), [({"data": 8}, 0, 1), ({"data": 4, "tensor": 2}, 48, 2), ({"fsdp": 8}, 48, 1)]
)
def test_the_bytes_of_a_pair_are_those_that_arrive_on_all_devices(prepared, towers, captions, mesh, canvas, copies):
    configuration = config.build({**SMALL, "mesh": mesh})
    on_mesh = make_towers(configuration, towers.preprocess, towers.tokenizer)
    arguments = configuration, on_mesh, Records(prepared, "all")
    batches, place = inputs.device_batches(*arguments, captions=captions()[0], steps=range(1), canvas=canvas)
    host = next(batches)
    batch = place(host)
    length = towers.preprocess.context_length
    expected = 3 * (canvas or 32) ** 2 + 4 * length + 4 + (8 if canvas else 0)
    assert inputs.bytes_per_pair(batch, BATCH) == copies * expected
    shards = [shard.data.nbytes for x in jax.tree.leaves(batch) for shard in x.addressable_shards]
    assert sum(shards) == copies * expected * BATCH == copies * sum(rows.nbytes for rows in host.values())
