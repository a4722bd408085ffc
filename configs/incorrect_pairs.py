"""Fine-tune towers with incorrect pairs (Tagami et al.), by one of the methods of the paper's section 4.1.

    python -m jaxclip.train --config=configs/incorrect_pairs.py:VARIANT --config.model.init_from=BASE \\
        --config.data.path=PATH --workdir=W

BASE is a trained workdir, such as that of configs/pretrain_fashion_products.py, or a checkpoint of transformers or
open_clip. VARIANT is one of
  2     correct pairs only
  3     correct pairs and as many incorrect ones: a picture with the text of any product of another group
  4     like 3, but the cosine of the two pictures' features is below 0.8
  5     like 3, but the cosine of the two pictures' features is below 0.2
  6     like 5, with each pair weighted by its similarity
  full  incorrect pairs from other clusters of pictures and of texts, weighted by similarity: the paper's method

The variants differ only in their incorrect pairs and weights: all take the same steps on the same pictures, each with
a correct and an incorrect text, of which variant 2 ignores the latter. --config.loss.info_nce=1 adds InfoNCE, which is
needed when training starts from random weights, because the other two terms consider one pair at a time:

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --config.loss.name=incorrect_pairs \\
        --config.loss.info_nce=1 --config.data.path=PATH --workdir=W

configs/README.md has the results of all variants on Fashion Product Images.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

# Variant -> (rule for mining pairs, weight of the term of incorrect pairs, weighting of each pair).
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
        raise UserError(
            f"--config=configs/incorrect_pairs.py:{variant}: {variant!r} is not a variant; "
            f"give one of {', '.join(VARIANTS)}"
        )
    rule, beta, weighting = VARIANTS[variant]
    config = ConfigDict()
    config.batch_size = 256
    config.epochs = 1.0
    config.data = ConfigDict({"reader": "fashion_product_images", "test": 1500.0, "split_seed": 42})
    config.incorrect_pairs = ConfigDict({"variant": rule})
    config.augmentation = ConfigDict({"crop_area": (0.4, 1.0), "flip": True, "keep_attributes": 0.7, "keep_words": 0.9})
    config.model = ConfigDict({"init_from": "runs/pretrain_fashion_products"})
    config.loss = ConfigDict({"name": "incorrect_pairs", "alpha": 1.0, "beta": beta, "weighting": weighting})
    config.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 20, "weight_decay": 0.2})
    config.checkpoint = ConfigDict({"every": 156})
    return config
