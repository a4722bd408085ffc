"""Train adapters (LoRA) on a run's towers, on Fashion Product Images (styles.csv + images/), small or full.

    python -m jaxclip.train --config=configs/lora_fashion_products.py --config.model.init_from=BASE \\
        --config.data.path=PATH --workdir=W

BASE is a trained workdir, such as that of configs/pretrain_fashion_products.py, or a checkpoint of transformers or
open_clip. The checkpoints in W contain only the adapters and the logit scale, a few per cent of the size of BASE.
Evaluating W needs BASE too; if it was moved, give its new location as --config.model.init_from.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ConfigDict()
    config.task = "adapter"
    config.batch_size = 256
    config.epochs = 2.0
    config.data = ConfigDict({"reader": "fashion_product_images", "test": 1500.0, "split_seed": 42})
    config.augmentation = ConfigDict({"crop_area": (0.4, 1.0), "flip": True, "keep_attributes": 0.7, "keep_words": 0.9})
    config.model = ConfigDict({"init_from": "runs/pretrain_fashion_products"})
    config.lora = ConfigDict({"rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": "/blocks/"})
    config.optimizer = ConfigDict(
        {"learning_rate": 5e-4, "warmup_steps": 50, "weight_decay": 0.0, "rates": (("^logit_scale$", 1.0),)}
    )
    config.checkpoint = ConfigDict({"every": 156})
    return config
