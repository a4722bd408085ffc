"""Converts adapters to the layout of the PEFT library, for models of transformers; there is no way back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxclip.models.lora import NAME, LoRAConfig
from jaxclip.models.weights.table import Params, TableRow

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def tensors(table: Sequence[TableRow], params: Params) -> dict[str, np.ndarray]:
    """Returns all adapters as PEFT's float32 tensors by name.

    An adapter's output is scale * (x A) B. If one of our linear maps combines several of transformers' (query, key,
    value), each of these gets all of A and its part of B.

    Args:
      table: transformers' layout of the towers without adapters.
      params: nested parameters with adapters.
    """
    leaves, rows = flatten_dict(params, sep="/"), {row.ours: row for row in table}
    adapters = {}
    for name in leaves:
        target, is_adapter, _ = name.partition(f"/{NAME}/a")
        if not is_adapter:
            continue
        row = rows[f"{target}/kernel"]
        stacked_a, stacked_b = (
            np.asarray(leaves[f"{target}/{NAME}/{leaf}"], np.float32)[() if row.stacked else None] for leaf in "ab"
        )
        for layer, (a, b) in enumerate(zip(stacked_a, stacked_b, strict=True)):
            rank = len(b)
            down, up = a.reshape(-1, rank).T, b.reshape(rank, -1).T  # (R, in), (out, R)
            for theirs, part in zip(row.names(layer), row.split(up), strict=True):
                module = _PREFIX + theirs.removesuffix(".weight")
                adapters[module + _DOWN] = np.ascontiguousarray(down)
                adapters[module + _UP] = np.ascontiguousarray(part)
    return adapters


def settings(config: LoRAConfig, base: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns the contents of adapter_config.json.

    Args:
      config: rank, alpha and dropout of the adapters.
      base: name or folder of the model to which the adapters belong.
      names: names of the adapters' tensors.
    """
    modules = {name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in names if name.endswith(_DOWN)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
