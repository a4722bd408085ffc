"""preprocess.json round-trips, and a missing or invalid file is a clear error."""

import pytest

from jaxclip.errors import UserError
from jaxclip.pipeline.preprocess import FILENAME, Preprocess


def test_saved_preprocessing_loads_unchanged(tmp_path, preprocess):
    preprocess.save(tmp_path)
    assert Preprocess.load(tmp_path) == preprocess


def test_a_workdir_without_preprocess_json_is_incomplete(tmp_path):
    with pytest.raises(UserError, match=r"preprocess\.json is missing: .* is not a complete workdir"):
        Preprocess.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"mean": 1}', '{"mean": [0], "std": [1], "sise": 3}', "null"])
def test_an_invalid_file_is_refused(tmp_path, content):
    (tmp_path / FILENAME).write_text(content)
    with pytest.raises(UserError, match=r"is not a preprocess\.json of this version"):
        Preprocess.load(tmp_path)
