"""The configuration: every section and field with its default, meaning and limits, each declared once."""

from dataclasses import dataclass

from jaxclip.config import values
from jaxclip.config.catalogue_sections import Data, Features, PairMining
from jaxclip.config.declare import ABOVE_ZERO, BELOW_ONE, ZERO_TO_ONE, Interval, Only, at_least, key, section
from jaxclip.config.rerank_section import Rerank
from jaxclip.losses import objective
from jaxclip.losses.exchange import EXCHANGES
from jaxclip.losses.incorrect_pairs import WEIGHTINGS
from jaxclip.losses.products import PRODUCTS
from jaxclip.models.attention import IMPLEMENTATIONS
from jaxclip.models.presets import PRESETS
from jaxclip.models.transformer import EXECUTIONS, SAVED

TOWERS: Only = ("task", ("towers", "adapter"))
INCORRECT_PAIRS: Only = ("loss.name", ("incorrect_pairs",))


@dataclass(frozen=True)
class Augmentation:
    """Random changes of pictures and captions in training; evaluation makes none."""

    crop_area: tuple[float, float] = key(
        (0.6, 1.0),
        "smallest and largest share of the picture's area in a random crop; (1, 1) here and in crop_aspect = no crops",
        limits=Interval(0, 1, low_included=False),
        check=values.interval,
    )
    crop_aspect: tuple[float, float] = key(
        (0.8, 1.25),
        "smallest and largest width / height of a random crop, relative to the picture's (with resize = crop: to 1)",
        limits=ABOVE_ZERO,
        check=values.interval,
    )
    flip: bool = key(
        False, "whether a picture is mirrored with probability 1/2; not for captions that mention left and right"
    )
    keep_attributes: float = key(
        1.0, "probability with which a caption keeps each of its attributes", limits=ZERO_TO_ONE
    )
    keep_words: float = key(1.0, "probability with which a caption keeps a word of the name", limits=ZERO_TO_ONE)
    prompts: bool = key(False, "whether one of OpenFashionCLIP's prompts, at random, replaces data.caption_template")
    queries: float = key(
        0.0,
        "share of the training pairs whose text is a judged query of the product (data.queries, split train) in place "
        "of a caption, weighted by its grade and weight; products without one keep their captions",
        limits=ZERO_TO_ONE,
    )

    @property
    def changes_captions(self) -> bool:
        return self.prompts or self.keep_attributes < 1 or self.keep_words < 1

    @property
    def keeps_whole_picture(self) -> bool:
        return self.crop_area == (1.0, 1.0) and self.crop_aspect == (1.0, 1.0)


@dataclass(frozen=True)
class Model:
    """The architecture of the towers, the checkpoint that they start from, and how they are computed."""

    preset: str = key("laptop", "shape of the towers", choices=PRESETS, from_checkpoint=True)
    patch: int = key(
        0,
        "side of a patch, pixels: smaller patches show more detail and cost more; 0 = the preset's",
        limits=at_least(0),
        from_checkpoint=True,
    )
    init_from: str = key(
        "",
        "checkpoint that training starts from, with its towers, tokenizer and preprocessing: a workdir, or a folder or "
        "Hugging Face name (NAME@REVISION) in the layout of transformers or open_clip",
    )
    dropout: float = key(0.0, "share of features zeroed after attention and MLP in training", limits=BELOW_ONE)
    stochastic_depth: float = key(
        0.0,
        "probability that an example skips the last block's attention, and separately its MLP, in training; it grows "
        "linearly over the blocks, from 0 at the first",
        limits=BELOW_ONE,
    )
    patch_dropout: float = key(0.0, "share of a picture's patches that training leaves out", limits=BELOW_ONE)
    dtype: str = key(
        "float32", "format of the towers' computation; embeddings are float32", choices=("float32", "bfloat16")
    )
    execution: str = key(
        "auto",
        "how a tower's layers are compiled: scan (one layer, looped), unroll (each layer), or auto (scan on TPUs, and "
        "on GPUs with remat)",
        choices=EXECUTIONS,
    )
    attention: str = key(
        "auto",
        "attention of the towers: xla; cudnn (NVIDIA GPUs, bfloat16) and pallas (TPUs), which keep its matrices out of "
        "memory; auto = the fastest on this back end",
        choices=IMPLEMENTATIONS,
    )
    remat: str = key(
        "none",
        "what the backward pass recomputes of a block, to save memory: none, dots (all but linear maps), full (all) or "
        f"all but the values named, comma-separated: {', '.join(SAVED)}",
        check=values.remat,
    )


@dataclass(frozen=True)
class Adapters:
    """The low-rank adapters (LoRA) that task = adapter trains on the parameters of model.init_from."""

    rank: int = key(8, "rank of an adapter's two matrices", limits=at_least(1))
    alpha: float = key(16.0, "an adapter's output is scaled by alpha / rank", limits=ABOVE_ZERO)
    dropout: float = key(0.0, "probability that an input feature of an adapter is zeroed in training", limits=BELOW_ONE)
    targets: str = key(
        "/blocks/", "regex that part of a linear map's name, such as image/transformer/blocks/mlp_in, must match"
    )


@dataclass(frozen=True)
class Loss:
    """The loss of the towers."""

    name: str = key(
        "info_nce",
        "info_nce (CLIP), sigmoid (SigLIP) or incorrect_pairs (with pairs from the section incorrect_pairs)",
        choices=objective.NAMES,
    )
    implementation: str = key(
        "auto",
        "dense (all similarities at once), tiled (memory grows only linearly with the batch) or auto (dense for up to "
        f"{objective.DENSE_ROWS:,} pairs)",
        choices=objective.IMPLEMENTATIONS,
    )
    tile: int = key(
        0, "rows and columns of a tile of similarities in the tiled loss; 0 = chosen by back end", limits=at_least(0)
    )
    exchange: str = key(
        "gather",
        "how devices exchange texts in the tiled loss: gather (in blocks, over all links of a device) or ring (from "
        "each device to the next, with the least memory)",
        choices=EXCHANGES,
    )
    products: str = key(
        "float32",
        "precision of the loss's matrix products, which are summed in float32: float32, bfloat16 (six times faster on "
        "TPUs) or bfloat16_3x (three bfloat16 products, twice as fast)",
        choices=PRODUCTS,
    )
    microbatch: int = key(
        0,
        "pairs that the towers process at a time, while the loss is still that of the whole batch; 0 = all pairs",
        limits=at_least(0),
    )
    temperature: float = key(
        0.07,
        "divisor that turns cosines into logits; if it is learned, its initial value, unless model.init_from is set",
        limits=at_least(0.01),
    )
    learned_temperature: bool = key(
        True, "whether the temperature is learned; it is at least 0.01, unless there is a logit bias, as with sigmoid"
    )
    mask_groups: bool = key(True, "whether pairs of one group are left out of each other's negatives")
    queue: int = key(
        0,
        "pairs of earlier batches kept as further negatives of InfoNCE; 0 = no queue. Use a low learning rate: "
        "randomly initialised towers can collapse at a high one",
        limits=at_least(0),
    )
    bias: float = key(
        -10.0, "initial bias of the logits, unless model.init_from provides one", only=("loss.name", ("sigmoid",))
    )
    alpha: float = key(1.0, "weight of the correct pairs' term", limits=at_least(0), only=INCORRECT_PAIRS)
    beta: float = key(1.0, "weight of the incorrect pairs' term", limits=at_least(0), only=INCORRECT_PAIRS)
    weighting: str = key(
        "similarity",
        "whether pairs are weighted by the similarity of the two products' pictures: similarity (yes), none (no) or "
        "literal (inside the logarithm, as the paper prints it, where weights have no effect on the gradient)",
        choices=WEIGHTINGS,
        only=INCORRECT_PAIRS,
    )
    info_nce: float = key(0.0, "weight with which InfoNCE is added", limits=at_least(0), only=INCORRECT_PAIRS)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: str = key(
        "adamw",
        "adamw, adam, or muon (linear maps and convolutions by Muon, all else by AdamW)",
        choices=("adamw", "adam", "muon"),
    )
    learning_rate: float = key(1e-3, "peak learning rate, reached after the warm-up", limits=at_least(0))
    schedule: str = key(
        "cosine", "the rate after the warm-up: cosine (to zero) or constant", choices=("cosine", "constant")
    )
    warmup_steps: int = key(
        100, "steps in which the rate grows linearly from zero; limited to half of the run", limits=at_least(0)
    )
    weight_decay: float = key(
        0.1,
        "weight decay of linear maps, convolutions, token embeddings and adapters, without their biases",
        limits=at_least(0),
        only=("optimizer.name", ("adamw", "muon")),
        otherwise=0.0,
    )
    beta1: float = key(0.9, "Adam's decay of the gradients' mean, per step", limits=BELOW_ONE)
    beta2: float = key(0.98, "Adam's decay of the mean of the squared gradients, per step", limits=BELOW_ONE)
    epsilon: float = key(1e-6, "Adam's constant added to the denominator", limits=ABOVE_ZERO)
    clip_norm: float = key(1.0, "norm to which the whole gradient is clipped; 0 = no clipping", limits=at_least(0))
    rates: tuple[tuple[str, float], ...] = key(
        (),
        "regex of parameter names -> factor of their learning rate; 0 = frozen; the first that matches applies",
        check=values.rates,
    )
    layer_decay: float = key(
        1.0,
        "a layer's rate is this factor times the rate of the layer above it, in each tower",
        limits=Interval(0, 1, low_included=False),
        only=TOWERS,
    )
    ema: float = key(
        0.0,
        "decay per step of a moving average of the parameters, which is lower in the first steps; 0 = no average",
        limits=BELOW_ONE,
        only=TOWERS,
    )


@dataclass(frozen=True)
class Mesh:
    """Number of devices along each axis of the mesh, one of which may be -1 (all remaining devices), and of slices."""

    data: int = key(-1, "devices over which only the batch is split")
    fsdp: int = key(1, "devices over which the batch and the parameters are split")
    tensor: int = key(1, "devices over which each layer's computation is split")
    slices: int = key(0, "TPU slices or GPU machines that data is split over; 0 = all there are", limits=at_least(0))


@dataclass(frozen=True)
class Checkpointing:
    """When the training state is saved."""

    every: int = key(500, "steps between checkpoints; every evaluation also saves one", limits=at_least(1))
    keep: int = key(2, "number of newest checkpoints to keep; the best by hit@1 is kept too", limits=at_least(1))


@dataclass(frozen=True)
class Evaluation:
    """When the validation split is ranked during training, and how evaluations embed and measure."""

    every: int = key(0, "steps between evaluations; 0 = only after the last step", limits=at_least(0))
    batch_size: int = key(256, "pictures or texts embedded at a time", limits=at_least(1))
    ks: tuple[int, ...] = key(
        (1, 5, 10), "depths k of hit@k, recall@k, precision@k and nDCG@k; 1 must be among them", check=values.depths
    )
    trial_size: int = key(
        100, "products in each of the 100 trials; papers take 100 or another number", limits=at_least(2)
    )
    zooms: tuple[float, ...] = key(
        (1.0,),
        "factors by which the picture is enlarged before it is embedded, 1 = not at all; its embedding is the mean "
        "over all factors",
        limits=at_least(1),
        check=values.not_empty,
        only=TOWERS,
    )
    mirror: bool = key(False, "whether the mean embedding also includes the mirrored picture at each zoom", only=TOWERS)


@dataclass(frozen=True)
class Config:
    """The experiment as a whole."""

    seed: int = key(
        0, "seed of parameters, order of the data, augmentation and dropout", limits=Interval(-(2**31), 2**31 - 1)
    )
    task: str = key(
        "towers",
        "what is trained: towers, adapter (LoRA on the towers of model.init_from) or rerank (a second stage on the "
        "towers of first_stage)",
        choices=("towers", "adapter", "rerank"),
    )
    first_stage: str = key(
        "",
        "workdir of the towers whose results are re-ranked; their catalogue is used unless another is set",
        only=("task", ("rerank",)),
    )
    batch_size: int = key(256, "pairs (of a re-ranker: queries) per step, over all devices", limits=at_least(1))
    steps: int = key(0, "length of the run in steps; set either this or epochs", limits=at_least(0))
    epochs: float = key(
        0.0, "length of the run in passes over the training data; set either this or steps", limits=at_least(0)
    )
    log_every: int = key(20, "steps between two lines of training metrics in metrics.jsonl", limits=at_least(1))
    data: Data = section(Data)
    features: Features = section(Features)
    incorrect_pairs: PairMining = section(PairMining)
    augmentation: Augmentation = section(Augmentation, only=TOWERS)
    model: Model = section(Model, only=TOWERS)
    lora: Adapters = section(Adapters, only=("task", ("adapter",)))
    loss: Loss = section(Loss, only=TOWERS)
    rerank: Rerank = section(Rerank, only=("task", ("rerank",)))
    optimizer: Optimizer = section(Optimizer)
    mesh: Mesh = section(Mesh)
    checkpoint: Checkpointing = section(Checkpointing)
    evaluation: Evaluation = section(Evaluation)
