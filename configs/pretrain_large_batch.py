"""Pretrain CLIP from scratch on a TPU slice or a GPU cluster, with a global batch of 65,536 pairs or more.

    python -m jaxclip.plan  --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16
    python -m jaxclip.train --config=configs/pretrain_large_batch.py:vit_l_14 --config.data.path=PATH --workdir=W

The argument after the colon is PRESET or PRESET,BATCH: vit_b_32, vit_b_16 (default) or vit_l_14, and the size of the
global batch (default: 65,536; a larger one must be a multiple of it). With a larger batch the towers process 65,536
pairs at a time; the gradients are still exact for the whole batch. PATH is a folder of webdataset tars (`data.reader`).
Run the plan first: on any machine with `pip install jaxclip[plan]` it computes in minutes whether the step fits into
memory, and a lower bound of its time. On v5e:16x16, vit_l_14 needs 14.44 of 15.75 GiB and at least 1.42 s;
`--config.mesh.fsdp=16` shards parameters and optimizer state.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

# Preset -> peak learning rate. The number of epochs, the warm-up and the weight decay are those of Radford et al. 2021
# (Table 18), who trained with batches of half the default size.
RATES = {"vit_b_32": 1e-3, "vit_b_16": 1e-3, "vit_l_14": 5e-4}
MICROBATCH = 65536  # pairs that the towers process at a time


def get_config(arg: str = "vit_b_16") -> ConfigDict:
    """Returns the configuration of PRESET or PRESET,BATCH."""
    preset, comma, batch = arg.partition(",")
    if preset not in RATES or (comma and not batch.isdigit()):
        presets = ", ".join(RATES)
        raise UserError(
            f"--config=configs/pretrain_large_batch.py:{arg}: {arg!r} is not PRESET or PRESET,BATCH, where PRESET is "
            f"one of {presets} and BATCH is a number of pairs"
        )
    config = ConfigDict()
    config.batch_size = int(batch) if comma else MICROBATCH
    config.loss = ConfigDict({"microbatch": MICROBATCH if config.batch_size > MICROBATCH else 0})
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
