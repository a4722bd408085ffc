"""Pretrain CLIP from scratch on a TPU slice or a GPU cluster, the global batch in the tens of thousands.

    python -m jaxclip.plan  --config=configs/pretrain_large_batch.py:vit_l_14 --topology=v5e:16x16
    python -m jaxclip.train --config=configs/pretrain_large_batch.py:vit_l_14 --config.data.path=PATH --workdir=W

ARG is vit_b_32, vit_b_16 (default) or vit_l_14. Data: webdataset tars in PATH (`data.reader`). Plan first: it tells in
minutes, on any machine with `pip install jaxclip[plan]`, whether the step fits and how long it takes at best. On a
v5e:16x16 vit_l_14 needs 13.97 of 15.75 GiB and 1.29 s at best; `--config.mesh.fsdp=16` splits parameters and optimizer.
"""

from ml_collections import ConfigDict

# 77 tokens, 224 pixels, 32 passes as in the paper (Radford et al. 2021, Table 18); its rates are for half the batch.
RATES = {"vit_b_32": 1e-3, "vit_b_16": 1e-3, "vit_l_14": 5e-4}


def get_config(preset: str = "vit_b_16") -> ConfigDict:
    """Returns the configuration of a preset."""
    config = ConfigDict()
    config.batch_size = 65536
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
