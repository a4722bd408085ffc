"""Incorrect pairs are mined once a rule, beside a dataset that stays as it is, from features or from towers."""

import dataclasses
import hashlib

import numpy as np
import pytest

from jaxclip import config as configs
from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records
from jaxclip.preparation import card_sections, mining, single_encoders


@pytest.fixture(scope="module")
def prepared(trained):
    """The dataset that `trained` was trained on, as its training prepared it."""
    return prepared_data.prepared_dataset(
        configs.load_config(trained), say=lambda line: pytest.fail(f"it was not there: {line}")
    )


def config_of(trained, **pairs):
    own = configs.load_config(trained)
    return dataclasses.replace(own, incorrect_pairs=dataclasses.replace(own.incorrect_pairs, **pairs))


def find_or_mine(config, prepared, said=None):
    said = [] if said is None else said
    return mining.find_or_mine(config, prepared, say=said.append)


def bytes_of(folder):
    files = sorted(path for path in (folder / builder.NAME).rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_rule_is_mined_once_and_another_beside_it(trained, prepared):
    before, said = bytes_of(prepared), []
    first = find_or_mine(config_of(trained), prepared, said)
    assert sum("mining" in line for line in said) == 1
    again = find_or_mine(config_of(trained), prepared, said)
    assert sum("mining" in line for line in said) == 1 and (again.partner == first.partner).all()
    other = find_or_mine(config_of(trained, variant="below:0.2"), prepared, said)
    assert sum("mining" in line for line in said) == 2 and other.similarity[other.products].max() < 0.2
    assert len(list((prepared / mining.FOLDER).glob("*.npz"))) == 2
    assert bytes_of(prepared) == before


def test_pairs_are_of_the_training_split_and_never_of_one_group(trained, prepared):
    pairs, records = find_or_mine(config_of(trained), prepared), Records(prepared, "train")
    groups = np.array([group for _, group in records.products()])
    assert len(pairs.partner) == len(records) == 120
    assert (groups[pairs.products] != groups[pairs.partner[pairs.products]]).all()


def test_towers_of_a_workdir_can_be_what_products_are_compared_by(trained, prepared):
    said = []
    pairs = find_or_mine(config_of(trained, features=f"towers:{trained}", clusters=4), prepared, said)
    assert any("step 12" in line for line in said) and len(pairs.products) > 100
    classical = find_or_mine(config_of(trained, clusters=4), prepared)
    assert not np.array_equal(pairs.similarity, classical.similarity)
    with pytest.raises(UserError, match="no checkpoints"):
        find_or_mine(config_of(trained, features=f"towers:{prepared}"), prepared)


def test_a_vit_and_a_bert_can_be_what_products_are_compared_by(trained, prepared, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    blocks = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTModel(transformers.ViTConfig(**blocks, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "shoes", "dress", "men", "women"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    settings = transformers.BertConfig(**blocks, vocab_size=len(words), max_position_embeddings=24)
    bert = transformers.BertModel(settings).eval()
    bert.save_pretrained(tmp_path / "bert")
    named = f"encoders:{tmp_path / 'vit'},{tmp_path / 'bert'}"
    pairs = find_or_mine(config_of(trained, features=named, clusters=4), prepared)
    assert len(pairs.products) > 100

    worded = ["red shoes", "blue dress men", "green " * 60]
    given = tokenizer(worded, padding="longest", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        expected = bert(**given).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(single_encoders.text_features(tmp_path / "bert", worded), expected, atol=2e-5)
    with pytest.raises(UserError, match="incorrect_pairs.features = '/nowhere'"):
        find_or_mine(config_of(trained, features=f"encoders:/nowhere,{tmp_path / 'bert'}"), prepared)


def test_a_dataset_without_features_says_how_to_get_them(trained, catalogue, tmp_path):
    builder.prepare(Source("drawn", catalogue, 20, 42, {}), tmp_path / "p", progress=lambda items, **_: items)
    with pytest.raises(UserError, match="features.detector"):
        find_or_mine(config_of(trained), tmp_path / "p")
    card = tmp_path / "p" / builder.CARD
    assert card_sections.complete(config_of(trained), tmp_path / "p", say=print) is None
    assert "Captions in tokens" in card.read_text() and "Incorrect pairs" not in card.read_text()


def test_prepare_completes_the_card_and_mines_another_rule_alone(run, config_file, tmp_path):
    folder = tmp_path / "p"
    settings = (f"--config={config_file}", f"--config.data.prepared={folder}")
    done = run("prepare", *settings)
    assert done.returncode == 0, done.stderr
    page = (folder / builder.CARD).read_text()
    assert all(f"<h2>{title}" in page for title in ("Captions in tokens", "Measured colours", "Incorrect pairs"))
    assert page.count('class="crop"') == 48 and page.count("similarity ") == 24
    before = bytes_of(folder)
    done = run("prepare", *settings, "--config.incorrect_pairs.variant=random")
    assert done.returncode == 0, done.stderr
    assert "describing" not in done.stderr and bytes_of(folder) == before
    assert "<code>random</code>" in (folder / builder.CARD).read_text()
    assert len(list((folder / mining.FOLDER).glob("*.npz"))) == 2
