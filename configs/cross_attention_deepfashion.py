"""Re-rank DeepFashion-MultiModal by cross-attention over the tokens of the query and of a candidate's picture.

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --workdir=W --config.data.path=PATH \\
      --config.data.reader=deepfashion_multimodal --config.data.product=photo --config.data.test=0.2 \\
      --config.data.second_stage=0.2 --config.data.context_length=77
    python -m jaxclip.train --config=configs/cross_attention_deepfashion.py --config.first_stage=W --workdir=R
    python -m jaxclip.train --config=configs/cross_attention_deepfashion.py:truncated --config.first_stage=W --workdir=T

With data.product=photo each photo with its own caption is a product, as the paper counts. The paper's transformer (6
layers, 8 heads) scores each (query, candidate) pair of the first stage's top 100. It is trained with a contrastive loss
within the batch. Captions of more than 77 tokens are split into up to three segments; `truncated` truncates them, as
the paper does. A search scores 100 pairs for each query, which is slow on a CPU, so use an accelerator.
"""

from ml_collections import ConfigDict

from jaxclip.errors import UserError

VARIANTS = ("segments", "truncated")


def get_config(variant: str = "segments") -> ConfigDict:
    """Returns the configuration of a variant: segments or truncated."""
    if variant not in VARIANTS:
        raise UserError(
            f"--config=configs/cross_attention_deepfashion.py:{variant}: {variant!r} is not a variant; "
            f"give one of {', '.join(VARIANTS)}"
        )
    config = ConfigDict()
    config.task = "rerank"
    config.first_stage = "runs/deepfashion"
    config.batch_size = 32
    config.epochs = 3.0
    config.rerank = ConfigDict({"preset": "cross_attention", "hidden": 256, "wordings": 1, "loss": "contrastive"})
    config.rerank.segments = 3 if variant == "segments" else 1
    config.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 200})
    config.evaluation = ConfigDict({"batch_size": 16})
    return config
