"""Fine-tune a pretrained CLIP on Fashion Product Images, as the fit-aware paper did with OpenAI's ViT-B/32.

    python -m jaxclip.train --config=configs/finetune_fashion_products.py --config.data.path=PATH --workdir=W

It trains for five epochs on 3,500 products, in batches of 64, with Adam at learning rate 5e-5 and a fixed temperature
of 0.07, and tests on 1,500 other products; 1,000 more choose the best checkpoint. It prints the layout of the paper's
Table 2 (R@{1,3,5,10,20}, zero-shot and fine-tuned) and Table 1 (the same by category). The paper reports R@1 .21 and
R@10 .65 zero-shot, .42 and .90 fine-tuned, where a query's own product alone is right: compare them with the figures by
`pairs`. --config.model.init_from=FOLDER starts from the weights of any CLIP or SigLIP on disk. Expect an hour or more
with ViT-B/32 on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ConfigDict()
    config.batch_size = 64
    config.epochs = 5.0
    config.data = ConfigDict(
        {
            "reader": "fashion_product_images",
            "test": 1500.0,
            "validation": 1000.0,
            "train": 3500,
            "split_seed": 42,
            "caption_template": "{name} {baseColour} {materialType} {pattern}",
        }
    )
    config.augmentation = ConfigDict({"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)})
    config.model = ConfigDict({"init_from": "openai/clip-vit-base-patch32"})
    config.loss = ConfigDict({"temperature": 0.07, "learned_temperature": False})
    # Except for the learning rate, these are PyTorch's defaults for Adam.
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "learning_rate": 5e-5,
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "beta2": 0.999,
            "epsilon": 1e-8,
            "clip_norm": 0.0,
        }
    )
    config.checkpoint = ConfigDict({"every": 55})
    config.evaluation = ConfigDict({"every": 55, "ks": (1, 3, 5, 10, 20)})
    return config
