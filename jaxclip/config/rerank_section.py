"""The section of the second stage."""

from dataclasses import dataclass

from jaxclip.config import values
from jaxclip.config.declare import BELOW_ONE, Only, at_least, key

GATED: Only = ("rerank.preset", ("gated",))
PAPER: Only = ("rerank.preset", ("paper",))
CROSS_ATTENTION: Only = ("rerank.preset", ("cross_attention",))


@dataclass(frozen=True)
class Rerank:
    """The second stage, which re-ranks the products that the towers retrieve."""

    preset: str = key(
        "gated",
        "gated, paper (the fit-aware paper's network) or cross_attention (over tokens of text and picture)",
        choices=("gated", "paper", "cross_attention"),
    )
    candidates: int = key(100, "K, the products that the first stage retrieves for each query", limits=at_least(2))
    features: str = key(
        "hubness,image,crop,colour,geometry,texture,attributes",
        f"features of a candidate that the network reads, comma-separated: any of {', '.join(values.RERANK_FEATURES)}",
        check=values.rerank_features,
        only=GATED,
    )
    wordings: int = key(
        4,
        "wordings of each training caption: the first as in evaluation, the others augmented as for the towers",
        limits=at_least(1),
    )
    segments: int = key(
        1,
        "largest number of parts into which a query longer than the context length is split; their embeddings are "
        "averaged, and cross_attention reads the tokens of all; 1 = the query is cut off",
        limits=at_least(1),
    )
    loss: str = key(
        "softmax",
        "softmax or lambda: over the candidates of a query; binary: over one relevant and one other candidate of each "
        "query; contrastive: over one relevant candidate of every query of the batch",
        choices=("softmax", "lambda", "binary", "contrastive"),
    )
    sampled: int = key(
        0,
        "candidates per query drawn for a step, at least one of them relevant; 0 = all",
        limits=at_least(2),
        only=("rerank.loss", ("softmax", "lambda")),
    )
    negatives: str = key(
        "top",
        "which irrelevant candidate is taken: random (any), worst (the last, as in the paper), top (one of the first "
        "ten) or mixed (one of these rules, drawn for each query)",
        choices=("random", "worst", "top", "mixed"),
        only=("rerank.loss", ("binary",)),
    )
    hidden: int = key(
        256,
        "width of the query's hidden layer (gated) or of the transformer (cross_attention)",
        limits=at_least(1),
        only=("rerank.preset", ("gated", "cross_attention")),
    )
    matching: int = key(
        64,
        "number of dimensions in which a query is compared with a feature of a candidate",
        limits=at_least(1),
        only=GATED,
    )
    layers: int = key(6, "number of transformer layers", limits=at_least(1), only=CROSS_ATTENTION)
    heads: int = key(
        8, "number of attention heads; must divide rerank.hidden", limits=at_least(1), only=CROSS_ATTENTION
    )
    dropout: float = key(0.1, "share of hidden features zeroed in training", limits=BELOW_ONE)
    combine: str = key(
        "add", "how the embeddings of crop and colour are combined", choices=("add", "concatenate"), only=PAPER
    )
    batch_norm: bool = key(False, "whether hidden features are normalised over the batch", only=PAPER)
    ablation: tuple[tuple[str, str], ...] = key(
        (),
        "name -> features: train and compare a re-ranker for each of these, instead of one with rerank.features; they "
        "rank the validation split if there is one and data.split is test",
        check=values.rerank_ablation,
        only=GATED,
    )
    seeds: int = key(
        1, "number of runs of each subset of rerank.ablation, with seeds seed, seed + 1, ...", limits=at_least(1)
    )
