"""Cross-attention as a re-ranker on DeepFashion-MultiModal: it reads the tokens of queries and candidates.

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --workdir=W --config.data.path=PATH \\
      --config.data.reader=deepfashion_multimodal --config.data.test=0.2 --config.data.second_stage=0.2 \\
      --config.data.context_length=77
    python -m jaxclip.train --config=configs/cross_attention_deepfashion.py --config.first_stage=W --workdir=R
    python -m jaxclip.train --config=configs/cross_attention_deepfashion.py:truncated --config.first_stage=W --workdir=T

The paper's block, 6 layers and 8 heads, as a scorer of pairs for the first stage's top 100, trained contrastively
within the batch. Captions of more than 77 tokens are read in up to three segments; `truncated` cuts them off, as the
paper does. All layers run for each of the 100 candidates of a query, at least a third of a second per query on a CPU,
so use an accelerator.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "segments") -> ConfigDict:
    """Returns the configuration of a variant: segments or truncated."""
    if variant not in ("segments", "truncated"):
        raise ValueError(f"variant {variant!r} is none of segments, truncated")
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
