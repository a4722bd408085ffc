"""Files are written completely or not at all."""

import os

import numpy as np
import pytest

from jaxclip.runtime import files


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"hit@1": 0.5})
    with pytest.raises(OSError, match="disk is full"), files.atomically(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk is full")
    assert path.read_text() == '{\n  "hit@1": 0.5\n}\n'
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_arrays_and_folders_are_written_under_their_own_name(tmp_path):
    with files.atomically(tmp_path / "pairs.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, partner=np.arange(3))
    with files.atomically(tmp_path / "export") as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == ["export", "pairs.npz"]
    assert np.load(tmp_path / "pairs.npz")["partner"].tolist() == [0, 1, 2]
    assert (tmp_path / "export" / "config.json").read_text() == "{}"


def test_two_writers_of_one_file_do_not_share_a_temporary_path(tmp_path):
    with files.atomically(tmp_path / "card.html") as one, files.atomically(tmp_path / "card.html") as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert (tmp_path / "card.html").read_text() == "one"


def test_a_fingerprint_changes_with_the_values_and_not_with_the_order_of_keys():
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1, "b": 2}) != files.fingerprint({"a": 1, "b": 3})
