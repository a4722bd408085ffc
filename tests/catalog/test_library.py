"""Datasets are prepared once, reused, and never confused with datasets prepared with other settings."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import jaxclip
from jaxclip import config as configs
from jaxclip.catalog import builder, library
from jaxclip.catalog.builder import Source
from jaxclip.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def source(home):
    """A folder of eight pictures with captions."""
    raw = home / "raw"
    raw.mkdir()
    for number in range(8):
        Image.new("RGB", (24, 30), (30 * number, 80, 10)).save(raw / f"{number}.png")
        (raw / f"{number}.txt").write_text(f"item {number}")
    return Source("folder", raw, 2, 0, {})


def find(source, prepared="", drawn=(6, 0)):
    """Returns the folder and the lines printed for the user."""
    lines = []
    folder = library.find_or_prepare(
        source, str(prepared), drawn=drawn, progress=lambda items, **_: items, say=lines.append
    )
    return folder, lines


def test_a_catalogue_is_prepared_once_and_reused(source, home):
    folder, lines = find(source)
    assert folder.parent == home / "cache" / "prepared" and builder.is_prepared(folder)
    assert lines[0] == f"preparing {source.path} (folder) into {folder}"
    assert lines[1].startswith("8 products in 8 groups (train 6, test 2); data card: ")
    assert find(source) == (folder, [])


def test_concurrent_preparations_share_one_result(source, home):
    lines, waits, folders = [], threading.Event(), []

    def say(line):
        lines.append(line)
        waits.set()

    def second():
        folders.append(library.find_or_prepare(source, "", drawn=(6, 0), progress=None, say=say))

    other = threading.Thread(target=second)

    def start_other(items, **_):
        if not other.ident:
            other.start()
            assert waits.wait(60)
        return items

    first = library.find_or_prepare(source, "", drawn=(6, 0), progress=start_other, say=lambda line: None)
    other.join(60)
    assert lines == [f"another process prepares in {home / 'cache' / 'prepared'}: waiting for it"]
    assert folders == [first] and builder.is_prepared(first)


def test_a_preparation_that_fails_leaves_no_folder_behind(source, home):
    for picture in source.path.glob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no product has a readable image"):
        find(source, home / "new" / "prepared")
    assert not (home / "new").exists() and not (home / "cache").exists()


def test_a_catalogue_that_grew_is_prepared_again(source):
    first, _ = find(source)
    Image.new("RGB", (24, 30), (1, 2, 3)).save(source.path / "9.png")
    second, lines = find(source)
    assert second != first and lines[-1].startswith("9 products")
    assert builder.metadata(first)["products"] == 8


def test_a_named_folder_is_used_and_reused(source, home):
    folder, lines = find(source, home / "here")
    assert folder == home / "here" and len(lines) == 2
    assert find(source, home / "here") == (folder, [])


def test_a_folder_prepared_with_other_settings_is_refused_and_the_error_names_them(source, home):
    find(source, home / "here")
    with pytest.raises(UserError, match=r"data\.test was 2, is 3, data\.split_seed was 0, is 1; give another folder"):
        find(replace(source, test=3, split_seed=1), home / "here")
    (home / "other").mkdir()
    with pytest.raises(UserError, match=r"data\.path was '.*raw', is '.*other'"):
        find(replace(source, path=home / "other"), home / "here")
    with pytest.raises(UserError, match=r"data\.reader was 'folder', is 'table'"):
        find(replace(source, reader="table"), home / "here")


def test_a_prepared_folder_can_be_used_without_its_raw_catalogue(source, home):
    find(source, home / "here")
    assert find(replace(source, path=home / "elsewhere"), home / "here")[0] == home / "here"
    assert find(replace(source, path=Path("")), home / "here")[0] == home / "here"


def test_a_run_without_a_split_prepares_one_split_for_all_products(source):
    folder, _ = find(replace(source, test=0))
    assert builder.metadata(folder)["splits"] == {builder.WHOLE: 8}
    assert folder != find(source)[0]


def test_a_split_dataset_serves_as_the_whole_catalogue_but_not_the_reverse(source, home):
    find(source, home / "split")
    assert find(replace(source, test=0), home / "split")[0] == home / "split"
    find(replace(source, test=0), home / "whole")
    with pytest.raises(UserError, match=r"data\.test was 0, is 2"):
        find(source, home / "whole")


def test_the_drawn_catalogue_is_drawn_once(home):
    drawn = Source("drawn", Path(""), 2, 0, {})
    folder, lines = find(drawn)
    assert lines[0] == f"drawing a catalogue of 6 products into {home / 'cache' / 'drawn' / '6-products-seed-0'}"
    assert builder.metadata(folder)["products"] == 6
    assert find(drawn) == (folder, [])
    assert find(drawn, drawn=(6, 1))[0] != folder


def test_an_error_names_a_missing_catalogue(source, home):
    with pytest.raises(UserError, match=r"there is no catalogue at .*absent; set --config\.data\.path"):
        find(replace(source, path=home / "absent"))


def test_the_cache_is_at_jaxclip_cache_or_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCLIP_CACHE", str(tmp_path))
    assert library.cache() == tmp_path
    monkeypatch.delenv("JAXCLIP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.cache() == tmp_path / "home" / ".cache" / "jaxclip"


def test_dropped_and_mended_products_are_reported(source):
    (source.path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (source.path / "2.txt").write_bytes(b"broken \xff")
    (source.path / "3.txt").write_text("")
    _, lines = find(source)
    assert lines[-1].startswith("7 products in 7 groups (train 5, test 2); 1 dropped, 2 mended: listed in ")


def write_outdated(folder, source, **changes):
    """Writes what remains to be read of a dataset in the format of an earlier version."""
    old = folder / "catalogue" / "1.0.0"
    old.mkdir(parents=True)
    recorded = {"reader": source.reader, "path": str(source.path.resolve()), "test": 2.0, "split_seed": 7}
    recorded |= {"columns": {"caption": "the title"}, "features": {"detector": "onnx:a.onnx"}, **changes}
    (old / "dataset_info.json").write_text("{}")
    (old / "metadata.json").write_text(json.dumps({"source": recorded}))
    return folder


def test_a_dataset_of_an_earlier_version_is_prepared_anew_from_its_source(source, home):
    prepared = write_outdated(home / "mine", source)
    folder, lines = find(source, prepared)
    assert folder == prepared and builder.is_prepared(folder) and lines[0].startswith("preparing ")
    assert not (prepared / "catalogue" / "1.0.0").exists() and builder.outdated(prepared) is None


@pytest.mark.parametrize(
    "other",
    [{"path": Path()}, {"reader": "drawn", "path": Path()}, {"reader": "webdataset"}, {"path": Path("/shops/other")}],
    ids=["no path", "the default, drawn", "another reader", "another path"],
)
def test_a_dataset_of_an_earlier_version_from_another_or_unknown_source_is_refused_with_the_command_that_renews_it(
    source, home, other
):
    prepared = write_outdated(home / "mine here", source)
    with pytest.raises(UserError) as error:
        find(replace(source, **other), prepared)
    assert "was prepared by an earlier version of jaxclip" in str(error.value)
    assert str(error.value).endswith(
        f"prepare it again with python -m jaxclip.prepare --config.data.reader=folder --config.data.path={source.path} "
        "--config.data.test=2.0 --config.data.split_seed=7 '--config.data.columns.caption=the title' "
        f"--config.features.detector=onnx:a.onnx '--config.data.prepared={prepared}'"
    )
    assert (prepared / "catalogue" / "1.0.0" / "metadata.json").exists() and not builder.is_prepared(prepared)


def test_a_drawn_dataset_of_an_earlier_version_is_prepared_anew_wherever_it_was_drawn(source, home):
    prepared = write_outdated(home / "mine", source, reader="drawn", path="/gone/6-products-seed-0")
    folder, _ = find(replace(source, reader="drawn", path=Path(), test=2), prepared)
    assert builder.metadata(folder)["source"]["reader"] == "drawn"


def test_searching_a_gallery_that_an_earlier_version_prepared_is_refused(source, home):
    prepared = write_outdated(home / "mine", source)
    (home / "run").mkdir()
    configs.save_config(configs.build({"steps": 1}), home / "run")
    with pytest.raises(UserError, match=r"mine was prepared by an earlier version .* python -m jaxclip\.prepare"):
        jaxclip.load(home / "run", prepared)
