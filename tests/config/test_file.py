"""A config file is read with its variant, and every mistake in naming one is a sentence."""

from pathlib import Path

import pytest

from jaxclip import config
from jaxclip.errors import UserError

CONFIGS = Path(config.__file__).parents[2] / "configs"
WITH_VARIANTS = {
    "cross_attention_deepfashion": "truncated",
    "incorrect_pairs": "4",
    "pretrain_large_batch": "vit_b_32,65536",
    "rerank_fashion_products": "paper",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_file_of_configs_takes_its_variants_and_names_unknown_ones(path):
    assert config.read_file(str(path)) != {}
    if path.stem in WITH_VARIANTS:
        assert config.read_file(f"{path}:{WITH_VARIANTS[path.stem]}") != config.read_file(str(path))
    with pytest.raises(UserError, match=rf"configs/{path.name}.*(has no variants|is not a variant|is not PRESET)"):
        config.read_file(f"{path}:misspelt")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.py", None, "there is no such file; give one of configs/"),
        ("notes.txt", "steps = 3", "is not a Python file"),
        ("other.py", "steps = 3", "has no function get_config"),
        ("broken.py", "x = 1\ndef get_config(:", "is not valid Python, at line 2"),
        ("needs.py", "def get_config(size): return {}", "needs a variant, as PATH:VARIANT"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_reason(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        config.read_file(str(tmp_path / name))
    assert name in str(error.value)


def test_an_error_inside_a_config_file_keeps_its_traceback(tmp_path):
    (tmp_path / "own.py").write_text("def get_config(): return {}['steps']")
    with pytest.raises(KeyError, match="steps"):
        config.read_file(str(tmp_path / "own.py"))
