"""Fine-tune towers with incorrect pairs (Tagami et al.), after one of the methods of its section 4.1.

    python -m jaxclip.train --config=configs/incorrect_pairs.py:VARIANT --config.model.init_from=BASE \\
        --config.data.path=PATH --workdir=W

BASE is a trained workdir, such as that of configs/pretrain_fashion_products.py, or a checkpoint of transformers or
open_clip. VARIANT is
  2     correct pairs only
  3     also as many incorrect pairs: a product's picture with any other product's text
  4     as 3, but the similarity of the two products' pictures is below 0.8
  5     as 3, but the similarity of the two products' pictures is below 0.2
  6     as 5, with pairs weighted by the similarity
  full  incorrect pairs from other clusters of pictures and of texts, weighted: the paper's own method

The variants differ in their pairs only: all take the same steps on the same pictures, each with a correct and an
incorrect text (which variant 2 ignores). --config.loss.info_nce=1 adds InfoNCE. Training from random weights needs it,
since the other two terms look at one pair at a time:

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --config.loss.name=incorrect_pairs \\
        --config.loss.info_nce=1 --config.data.path=PATH --workdir=W

Whether the variants rank as in the paper is to be tested; README.md has the results on Fashion Product Images.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

# pairs mined, weight of the incorrect pairs' term, weighting
VARIANTS = {
    "2": ("random", 0.0, "none"),
    "3": ("random", 1.0, "none"),
    "4": ("below:0.8", 1.0, "none"),
    "5": ("below:0.2", 1.0, "none"),
    "6": ("below:0.2", 1.0, "similarity"),
    "full": ("clustered", 1.0, "similarity"),
}


def get_config(variant: str = "full") -> ConfigDict:
    """Returns the configuration of a variant."""
    if variant not in VARIANTS:
        raise UserError(f"configs/incorrect_pairs.py:{variant} is not one of its variants, {', '.join(VARIANTS)}")
    mined, beta, weighting = VARIANTS[variant]
    config = ConfigDict()
    config.batch_size = 256
    config.epochs = 1.0
    config.data = ConfigDict({"reader": "fashion_product_images", "test": 1500.0, "split_seed": 42})
    config.incorrect_pairs = ConfigDict({"variant": mined})
    config.augmentation = ConfigDict({"crop_area": (0.4, 1.0), "flip": True, "keep_attributes": 0.7, "keep_words": 0.9})
    config.model = ConfigDict({"init_from": "runs/pretrain_fashion_products"})
    config.loss = ConfigDict({"name": "incorrect_pairs", "alpha": 1.0, "beta": beta, "weighting": weighting})
    config.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 20, "weight_decay": 0.2})
    config.checkpoint = ConfigDict({"every": 156})
    return config
