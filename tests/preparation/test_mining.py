"""Incorrect pairs are mined once per rule, from several kinds of features, and the dataset is not changed."""

import hashlib
import json
from dataclasses import replace

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
    """The prepared dataset that `trained` was trained on."""
    return prepared_data.prepared_dataset(
        configs.load_config(trained), say=lambda line: pytest.fail(f"the dataset is not reused: {line}")
    )


def pairs_config(workdir, **changes):
    """Returns the configuration of a workdir with these changes to `incorrect_pairs`."""
    config = configs.load_config(workdir)
    return replace(config, incorrect_pairs=replace(config.incorrect_pairs, **changes))


def find_or_mine(config, prepared, lines=None):
    """Returns the mined pairs; appends the lines that are shown to the user to `lines`."""
    lines = [] if lines is None else lines
    return mining.find_or_mine(config, prepared, say=lines.append)


def checksums(folder):
    """Returns the checksum of each record file in a prepared folder, which excludes the card and the pair tables."""
    files = sorted(path for path in (folder / builder.NAME).rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_rule_is_mined_once_and_another_rule_gets_its_own_table(trained, prepared):
    before, lines = checksums(prepared), []
    first = find_or_mine(pairs_config(trained), prepared, lines)
    assert sum("mining" in line for line in lines) == 1
    again = find_or_mine(pairs_config(trained), prepared, lines)
    assert sum("mining" in line for line in lines) == 1 and (again.partner == first.partner).all()
    other = find_or_mine(pairs_config(trained, variant="below:0.2"), prepared, lines)
    assert sum("mining" in line for line in lines) == 2 and other.similarity[other.products].max() < 0.2
    assert len(list((prepared / mining.FOLDER).glob("*.npz"))) == 2
    assert checksums(prepared) == before


def test_another_caption_template_or_other_measured_colours_get_a_table_of_their_own(trained, prepared, tmp_path):
    config = pairs_config(trained)
    reworded = replace(config, data=replace(config.data, caption_template="{name} in {baseColour}"))
    metadata = builder.folder(prepared) / "metadata.json"
    copy = tmp_path / metadata.relative_to(prepared)
    copy.parent.mkdir(parents=True)
    facts = json.loads(metadata.read_text())
    facts["source"][builder.DESCRIBER_KEY] = {**facts["source"][builder.DESCRIBER_KEY], "colours": 7}
    copy.write_text(json.dumps(facts))
    tables = {
        mining.table(folder, mining.settings(each, folder)).name
        for each, folder in ((config, prepared), (reworded, prepared), (config, tmp_path))
    }
    assert len(tables) == 3


def test_pairs_are_from_the_training_split_and_from_different_groups(trained, prepared):
    pairs, records = find_or_mine(pairs_config(trained), prepared), Records(prepared, "train")
    groups = np.array([group for _, group in records.products()])
    assert len(pairs.partner) == len(records) == 90
    assert (groups[pairs.products] != groups[pairs.partner[pairs.products]]).all()


def test_products_can_be_compared_by_the_towers_of_a_workdir(trained, prepared):
    lines = []
    pairs = find_or_mine(pairs_config(trained, features=f"towers:{trained}", clusters=4), prepared, lines)
    assert any("step 12" in line for line in lines) and len(pairs.products) > 75
    classical = find_or_mine(pairs_config(trained, clusters=4), prepared)
    assert not np.array_equal(pairs.similarity, classical.similarity)
    with pytest.raises(UserError, match="no checkpoints"):
        find_or_mine(pairs_config(trained, features=f"towers:{prepared}"), prepared)


def test_products_can_be_compared_by_a_vit_and_a_bert(trained, prepared, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "shoes", "dress", "men", "women"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    bert_config = transformers.BertConfig(**size, vocab_size=len(words), max_position_embeddings=24)
    bert = transformers.BertModel(bert_config).eval()
    bert.save_pretrained(tmp_path / "bert")
    features = f"encoders:{tmp_path / 'vit'},{tmp_path / 'bert'}"
    pairs = find_or_mine(pairs_config(trained, features=features, clusters=4), prepared)
    assert len(pairs.products) > 75

    texts = ["red shoes", "blue dress men", "green " * 60]
    tokens = tokenizer(texts, padding="longest", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        expected = bert(**tokens).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(single_encoders.text_features(tmp_path / "bert", texts), expected, atol=2e-5)
    with pytest.raises(UserError, match="incorrect_pairs.features = '/nowhere'"):
        find_or_mine(pairs_config(trained, features=f"encoders:/nowhere,{tmp_path / 'bert'}"), prepared)


def test_mining_a_dataset_without_features_names_the_setting_that_adds_them(trained, catalogue, tmp_path):
    builder.prepare(Source("drawn", catalogue, 20, 42, {}), tmp_path / "p", progress=lambda items, **_: items)
    with pytest.raises(UserError, match="features.detector"):
        find_or_mine(pairs_config(trained), tmp_path / "p")
    card = tmp_path / "p" / builder.CARD
    assert card_sections.complete(pairs_config(trained), tmp_path / "p", say=print) is None
    assert "Captions in tokens" in card.read_text() and "Incorrect pairs" not in card.read_text()


def test_prepare_completes_the_card_and_a_second_rule_only_adds_a_table(run, config_file, tmp_path):
    folder = tmp_path / "p"
    settings = (f"--config={config_file}", f"--config.data.prepared={folder}")
    done = run("prepare", *settings)
    assert done.returncode == 0, done.stderr
    page = (folder / builder.CARD).read_text()
    assert all(f"<h2>{title}" in page for title in ("Captions in tokens", "Measured colours", "Incorrect pairs"))
    assert page.count('class="crop"') == 48 and page.count('<p class="quiet">similarity ') == 24
    before = checksums(folder)
    done = run("prepare", *settings, "--config.incorrect_pairs.variant=random")
    assert done.returncode == 0, done.stderr
    assert "describing" not in done.stderr and checksums(folder) == before
    assert "<code>random</code>" in (folder / builder.CARD).read_text()
    assert len(list((folder / mining.FOLDER).glob("*.npz"))) == 2
