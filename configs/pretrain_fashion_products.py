"""Train CLIP from scratch on Fashion Product Images (styles.csv + images/), small or full.

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --config.data.path=PATH --workdir=W

On the small catalogue (41,446 photos, 1,500 of them for testing), expect a text-to-image hit@1 of .62 and hit@10 of .92
by `groups` with names and attributes as queries (chance: .003 and .029); measured with --config.data.validation=0. With
--config.model.dtype=bfloat16, training takes two hours on two CPU cores with AMX. --config.model.patch=16 makes steps
faster, but lowers hit@10.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ConfigDict()
    config.batch_size = 256
    config.epochs = 18.0
    config.data = ConfigDict(
        {
            "reader": "fashion_product_images",
            "test": 1500.0,
            "split_seed": 42,
            "image_size": 64,
            "context_length": 16,
            "vocab_size": 8192,
            # Product photos are mostly white.
            "mean": (0.85, 0.83, 0.82),
            "std": (0.25, 0.25, 0.25),
        }
    )
    config.augmentation = ConfigDict({"crop_area": (0.4, 1.0), "flip": True, "keep_attributes": 0.5, "keep_words": 0.8})
    config.model = ConfigDict({"preset": "laptop", "patch": 8, "stochastic_depth": 0.1, "patch_dropout": 0.5})
    config.optimizer = ConfigDict({"name": "muon", "learning_rate": 3e-3, "warmup_steps": 125, "weight_decay": 0.2})
    config.checkpoint = ConfigDict({"every": 156})
    config.evaluation = ConfigDict({"every": 312, "zooms": (1.0, 1.15), "mirror": True})
    return config
