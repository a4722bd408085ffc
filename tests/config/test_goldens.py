"""Every file of configs/ is a valid configuration, and no value of it changes unnoticed.

To write the goldens after an intended change: JAXCLIP_WRITE_GOLDENS=1 python -m pytest tests/config/test_goldens.py
"""

import ast
import json
import os
from pathlib import Path

import pytest

from jaxclip import config
from jaxclip.errors import UserError
from jaxclip.losses.objective import DENSE_ROWS
from jaxclip.models.transformer import SAVED

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "configs"
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def from_file(name):
    """Returns the configuration of a file of configs/, with PATH as its catalogue."""
    path = ROOT / "configs" / f"{name}.py"
    assert "python -m jaxclip." in ast.get_docstring(ast.parse(path.read_text())), (
        f"the docstring of configs/{name}.py must show the command that runs it"
    )
    settings = config.read_file(str(path))
    needs_path = settings.get("data", {}).get("reader", "drawn") != "drawn"
    return config.build(settings, {"data.path": "PATH"} if needs_path else {})


@pytest.mark.parametrize("name", FILES)
def test_no_default_of_a_config_file_changes_unnoticed(name):
    golden, current = GOLDENS / f"{name}.json", json.dumps(config.dump(from_file(name)), indent=2) + "\n"
    if os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1":
        golden.write_text(current)
    assert golden.exists(), f"{golden} is missing: run with JAXCLIP_WRITE_GOLDENS=1 and check the file"
    assert json.loads(golden.read_text()) == json.loads(current)


def test_every_golden_file_belongs_to_a_config_file():
    assert sorted(path.stem for path in GOLDENS.glob("*.json")) == FILES


def variant_of(name, argument):
    """Returns the configuration of configs/NAME.py:ARGUMENT."""
    return config.build(config.read_file(f"{ROOT}/configs/{name}.py:{argument}"), {"data.prepared": "shop"})


@pytest.mark.parametrize(("batch", "microbatch"), [(32768, 0), (65536, 0), (131072, 32768), (1048576, 32768)])
@pytest.mark.parametrize("preset", ["vit_b_32", "vit_b_16", "vit_l_14"])
def test_a_large_batch_is_tiled_and_the_largest_are_split_into_microbatches(preset, batch, microbatch):
    built = variant_of("pretrain_large_batch", f"{preset},{batch}")
    if preset == "vit_l_14":
        microbatch //= 2
    assert (built.batch_size, built.loss.microbatch, built.model.preset) == (batch, microbatch, preset)
    assert (built.model.dtype, built.model.execution, built.loss.products) == ("bfloat16", "auto", "bfloat16")
    # Inside a microbatch, which is computed twice, nothing that takes products is computed a third time.
    assert built.model.remat == ("full" if preset == "vit_l_14" and not microbatch else ",".join(SAVED))
    assert built.loss.implementation == "auto" and batch > DENSE_ROWS


@pytest.mark.parametrize("argument", ["vit_h_14", "vit_b_16,", "vit_b_16,many"])
def test_a_bad_argument_of_the_large_batch_file_is_refused(argument):
    with pytest.raises(UserError, match=f"configs/pretrain_large_batch.py:{argument}: '{argument}' is not PRESET"):
        variant_of("pretrain_large_batch", argument)


@pytest.mark.parametrize("variant", ["gated", "ablation", "paper"])
def test_every_variant_of_the_reranker_is_a_valid_configuration(variant):
    built = variant_of("rerank_fashion_products", variant)
    assert built.rerank.preset == ("paper" if variant == "paper" else "gated")
    assert bool(built.rerank.ablation) == (built.rerank.seeds == 3) == (variant == "ablation")
