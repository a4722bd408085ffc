"""Cross-modal attention as a second stage on DeepFashion-MultiModal: queries and candidates are read token by token.

    python -m jaxclip.train --config=configs/pretrain_fashion_products.py --workdir=W --config.data.path=PATH \\
      --config.data.reader=deepfashion_multimodal --config.data.test=0.2 --config.data.second_stage=0.2 \\
      --config.data.context_length=77
    python -m jaxclip.train --config=configs/cross_attention_deepfashion.py --config.first_stage=W --workdir=R

The paper's block, 6 layers and 8 heads, as a scorer of pairs for the first stage's top 100. It reads 100 candidates for
each query with all layers: on CPU count on seconds per query, this is for an accelerator.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ConfigDict()
    config.task = "rerank"
    config.first_stage = "runs/deepfashion"
    config.batch_size = 32
    config.epochs = 3.0
    config.rerank = ConfigDict(
        {"preset": "cross_attention", "hidden": 256, "sampled": 16, "wordings": 1, "loss": "softmax"}
    )
    config.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 200})
    config.evaluation = ConfigDict({"batch_size": 16})
    return config
