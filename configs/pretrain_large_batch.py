"""Pretrain CLIP from scratch on a TPU slice or a GPU cluster, with a global batch of tens of thousands of pairs.

    python -m jaxclip.plan  --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16
    python -m jaxclip.train --config=configs/pretrain_large_batch.py:vit_l_14 --config.data.path=PATH --workdir=W

ARG is PRESET or PRESET,BATCH: vit_b_32, vit_b_16 (default) or vit_l_14, and a global batch, from 32,768 to 1,048,576
(default: 65,536). With a larger batch the towers process 65,536 pairs at a time; the gradients are still those of the
whole batch. PATH holds webdataset tars (`data.reader`). Run the plan first: on any machine with `pip install
jaxclip[plan]` it finds out in minutes whether the step fits into memory and the least time that it can take.
On v5e:16x16 vit_l_14 needs 13.97 of 15.75 GiB and at least 1.28 s; `--config.mesh.fsdp=16` shards parameters and
optimizer state.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

# The paper's settings (Radford et al. 2021, Table 18), whose learning rates are for half of this batch.
RATES = {"vit_b_32": 1e-3, "vit_b_16": 1e-3, "vit_l_14": 5e-4}
AT_ONCE = 65536  # pairs that the towers process at a time


def get_config(arg: str = "vit_b_16") -> ConfigDict:
    """Returns the configuration of a preset, or of PRESET,BATCH."""
    preset, comma, batch = arg.partition(",")
    if preset not in RATES or (comma and not batch.isdigit()):
        presets = ", ".join(RATES)
        raise UserError(
            f"configs/pretrain_large_batch.py:{arg} is not PRESET or PRESET,BATCH with a preset of {presets}"
        )
    config = ConfigDict()
    config.batch_size = int(batch) if comma else AT_ONCE
    config.loss = ConfigDict({"microbatch": AT_ONCE if config.batch_size > AT_ONCE else 0})
    config.epochs = 32.0
    config.data = ConfigDict(
        {"reader": "webdataset", "image_size": 224, "context_length": 77, "vocab_size": 49408, "test": 10000.0}
    )
    config.augmentation = ConfigDict({"crop_area": (0.5, 1.0)})
    config.model = ConfigDict({"preset": preset, "dtype": "bfloat16", "execution": "scan", "remat": "full"})
    config.optimizer = ConfigDict({"learning_rate": RATES[preset], "warmup_steps": 2000, "weight_decay": 0.2})
    config.checkpoint = ConfigDict({"every": 1000})
    config.evaluation = ConfigDict({"every": 5000, "batch_size": 4096})
    return config
