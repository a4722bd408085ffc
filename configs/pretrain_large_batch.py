"""Pretrain CLIP from scratch on a TPU slice or a GPU cluster, with a global batch of 65,536 pairs or more.

    python -m jaxclip.plan  --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16
    python -m jaxclip.train --config=configs/pretrain_large_batch.py:vit_l_14 --config.data.path=PATH --workdir=W

The argument after the colon is PRESET or PRESET,BATCH: vit_b_32, vit_b_16 (default) or vit_l_14, and the size of the
global batch (default: 65,536). With a larger batch, a multiple of 32,768, the towers process 32,768 pairs at a time
(vit_l_14: 16,384); the loss and its gradients are still those of the whole batch. PATH is a folder of webdataset tars
(`data.reader`).

`model.remat` was chosen with plans for TPU v5e:16x16: the ViT-B presets, and all presets in parts of a batch, recompute
only what takes no matrix products; vit_l_14 otherwise recomputes everything. Devices with more than 16 GiB can
recompute less: `--config.model.remat=qkv,mixed,attended,hidden`, or `none`.

Run the plan first: on any machine with `pip install jaxclip[plan]` it computes in minutes whether the step fits into
memory, and a lower bound of its time. On v5e:16x16, vit_l_14 needs 12.30 of 15.75 GiB and at least 0.84 s;
`--config.mesh.fsdp=16` shards parameters and optimizer state.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

# Preset -> peak learning rate. The number of epochs, the warm-up and the weight decay are those of Radford et al. 2021
# (Table 18), who trained with batches of half the default size.
RATES = {"vit_b_32": 1e-3, "vit_b_16": 1e-3, "vit_l_14": 5e-4}
BATCH = 65536
MICROBATCHES = {"vit_b_32": 32768, "vit_b_16": 32768, "vit_l_14": 16384}
"""Preset -> pairs that the towers process at a time in a batch larger than BATCH."""
KEEP_PRODUCTS = "qkv,mixed,attended,hidden"  # keeps the results of all matrix products in the layers


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
    config.batch_size = int(batch) if comma else BATCH
    parts = config.batch_size > BATCH
    config.loss = ConfigDict({"microbatch": MICROBATCHES[preset] if parts else 0, "products": "bfloat16"})
    config.epochs = 32.0
    config.data = ConfigDict(
        {"reader": "webdataset", "image_size": 224, "context_length": 77, "vocab_size": 49408, "test": 10000.0}
    )
    config.augmentation = ConfigDict({"crop_area": (0.5, 1.0)})
    remat = "full" if preset == "vit_l_14" and not parts else KEEP_PRODUCTS
    config.model = ConfigDict({"preset": preset, "dtype": "bfloat16", "remat": remat})
    config.optimizer = ConfigDict({"learning_rate": RATES[preset], "warmup_steps": 2000, "weight_decay": 0.2})
    config.checkpoint = ConfigDict({"every": 1000})
    config.evaluation = ConfigDict({"every": 5000, "batch_size": 4096})
    return config
