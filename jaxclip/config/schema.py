"""What can be configured: every section, its fields, their units and defaults."""

from dataclasses import dataclass, field

from jaxclip.catalog import captions
from jaxclip.losses.tiled import TILE
from jaxclip.models.clip import CLIP_MEAN, CLIP_STD

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Columns:
    """Names of columns, features or keys (readers table, tfds, webdataset); an empty one has its usual names."""

    id: str = ""
    image: str = ""
    caption: str = ""
    category: str = ""


@dataclass(frozen=True)
class Data:
    """Where the products come from and how a picture and a caption reach the towers."""

    reader: str = "drawn"  # layout of the raw catalogue: a key of jaxclip.catalog.readers.READERS
    path: str = ""  # raw catalogue; the drawn one needs none
    prepared: str = ""  # folder of the prepared dataset; "" = under $JAXCLIP_CACHE, found again by its content
    split: str = "test"  # what evaluation ranks: train, test or all
    test: float = 0.1  # products held back for testing: a number (>= 1) or a share (< 1); whole groups only
    train: int = 0  # training products used, a random choice that is always the same; 0 = all
    split_seed: int = 42  # of the split alone, so that runs with other seeds share their test products
    second_stage: float = 0.0  # training products the towers never see, to train a re-ranker on: a number or a share
    columns: Columns = field(default_factory=Columns)
    drawn_products: int = 4000  # size of the drawn catalogue
    drawn_seed: int = 0
    # What the towers see of a picture: whole, or crop, the first that `features` made; "" = model.init_from's or whole
    picture: str = ""
    image_size: int = 0  # side of the towers' square pictures, pixels; 0 = that of model.init_from, else 64
    resize: str = "squash"  # squash: to a square, whatever the shape; crop: shorter side, then the centre (CLIP)
    # Where training scales pictures: on the host, by Pillow; on the device, ahead of the step, so that the host only
    # decodes; auto: on GPUs and TPUs, but for catalogues of pictures more than six times as long as image_size
    resize_on: str = "auto"
    mean: RGB = CLIP_MEAN  # of the pixels, per channel, in [0, 1]
    std: RGB = CLIP_STD
    caption_template: str = captions.DEFAULT_TEMPLATE
    lowercase: bool = True
    tokenizer: str = ""  # folder of a Hugging Face tokenizer; "" = a byte-level BPE trained on the training captions
    vocab_size: int = 8192  # of the trained BPE
    context_length: int = 0  # tokens of a caption, both special ones included; 0 = that of model.init_from, else 32
    workers: int = 0  # parallel decoders, and processes of the preparation; 0 = as many as help


@dataclass(frozen=True)
class Features:
    """What preparation computes of each product and stores beside its picture."""

    detector: str = "foreground"  # none, foreground, faster_rcnn[:WEIGHTS], transformers:NAME, onnx:FILE, boxes:JSON
    policy: str = "largest"  # which of the boxes become crops: largest, confident, category or all:K
    padding: float = 0.05  # of a crop on each side, as a share of its box
    colours: int = 3  # of the first crop, kept with their shares and names


@dataclass(frozen=True)
class IncorrectPairs:
    """Whose text a training product's picture is shown with as a mismatch: mined once, a table beside the dataset."""

    variant: str = "clustered"  # clustered (the paper's rule), random or below:T (cosine of the pictures below T)
    clusters: int = 10  # of pictures, and of texts (clustered only)
    seed: int = 0  # of clusters and draws
    features: str = "classical"  # what pictures and texts are compared by: classical, towers:WORKDIR, encoders:VIT,BERT


@dataclass(frozen=True)
class Augmentation:
    """What training does to a pair; evaluation never does."""

    crop_area: tuple[float, float] = (0.6, 1.0)  # share of the picture a random crop keeps; (1, 1) = none
    crop_aspect: tuple[float, float] = (0.8, 1.25)  # of the crop, relative to the picture's own
    flip: bool = False  # mirror half of the pictures; leave off where captions name sides
    keep_attributes: float = 1.0  # probability with which a caption keeps each of its attributes
    keep_words: float = 1.0  # probability with which a caption keeps each word of the name
    prompts: bool = False  # draw the caption's wording from OpenFashionCLIP's prompt templates

    @property
    def keeps_whole_picture(self) -> bool:
        return self.crop_area == (1.0, 1.0) and self.crop_aspect == (1.0, 1.0)


@dataclass(frozen=True)
class Model:
    """The towers."""

    preset: str = "laptop"  # a key of jaxclip.models.presets.PRESETS
    patch: int = 0  # side of a patch, pixels: shorter ones see more, at a price; 0 = the preset's
    # Checkpoint to begin from: a folder or a name on the Hugging Face hub (NAME@REVISION) in the layout of transformers
    # or open_clip, or a workdir. Towers, tokenizer and preprocessing are then its own.
    init_from: str = ""
    dropout: float = 0.0  # share of features zeroed after attention and MLP
    stochastic_depth: float = 0.0  # share of examples that skip the last block, linear in depth
    patch_dropout: float = 0.0  # share of a picture's patches that training leaves out
    dtype: str = "float32"  # of the computation: float32 or bfloat16; parameters are float32
    execution: str = "auto"  # scan (one compiled layer), unroll (faster steps on CPU), auto
    remat: str = "none"  # what the backward pass recomputes: none, dots (all but matrix products), full


@dataclass(frozen=True)
class LoRA:
    """The adapters that task = adapter trains on the parameters of model.init_from (models/lora.py)."""

    rank: int = 8
    alpha: float = 16.0  # what an adapter adds is scaled by alpha / rank
    dropout: float = 0.0  # share of an adapter's input features zeroed in training
    targets: str = "/blocks/"  # regex of the linear maps that have one, as image/transformer/blocks/attention/qkv


@dataclass(frozen=True)
class Loss:
    """The contrastive loss."""

    name: str = "info_nce"  # info_nce (CLIP), sigmoid (SigLIP) or incorrect_pairs
    implementation: str = "auto"  # dense (all similarities at once), tiled (memory grows with the batch), auto
    tile: int = TILE  # rows and columns of a tile of similarities
    microbatch: int = 0  # pairs the towers see at a time, the loss being that of the whole batch; 0 = all of them
    temperature: float = 0.07  # of the softmax; where training starts if it is learned, but for model.init_from's own
    learned_temperature: bool = True  # clipped so that logits are scaled by at most 100
    mask_groups: bool = True  # rows of one group are not each other's negatives
    # pairs of earlier batches kept as further negatives of InfoNCE, in the training state; 0 = none. For low rates:
    # towers that begin at random and at a high one run away from what they made before, and collapse
    queue: int = 0
    bias: float = -10.0  # of the logits at the start, where model.init_from brings none of its own (sigmoid only)
    alpha: float = 1.0  # weight of the correct pairs' term (incorrect_pairs only)
    beta: float = 1.0  # weight of the incorrect pairs' term (incorrect_pairs only)
    weighting: str = "similarity"  # of each pair: similarity, none, literal (incorrect_pairs only)
    info_nce: float = 0.0  # weight with which InfoNCE is added (incorrect_pairs only)


@dataclass(frozen=True)
class Rerank:
    """The second stage (task = rerank)."""

    preset: str = "gated"  # gated, paper (the fit-aware paper's network) or cross_attention (over tokens)
    candidates: int = 100  # K, how many products the first stage retrieves for each query
    # of a candidate (gated), of these: hubness, image, crop, colour, geometry, texture, attributes, caption_attributes
    features: str = "hubness,image,crop,colour,geometry,texture,attributes"
    wordings: int = 4  # of each training caption; the first as evaluation words it, the others augmented
    segments: int = 1  # parts that a query beyond the context length is read in, their vectors pooled; 1 = cut off
    # over the list: softmax or lambda; over pairs of an answer and a negative: binary; over the batch's answers to
    # other queries: contrastive
    loss: str = "softmax"
    sampled: int = 0  # candidates of a list that a step looks at, an answer among them; 0 = all
    negatives: str = "top"  # of binary pairs: random, worst (the paper's), top or mixed
    hidden: int = 256  # features of the query that gates and matches are computed from (gated); width (cross_attention)
    matching: int = 64  # features in which a query and a feature of a candidate are compared (gated)
    layers: int = 6  # (cross_attention)
    heads: int = 8  # (cross_attention)
    dropout: float = 0.1
    combine: str = "add"  # embeddings of crop and colour (paper): add or concatenate
    batch_norm: bool = False  # (paper)
    ablation: tuple[tuple[str, str], ...] = ()  # name -> features: train and compare all of these instead
    seeds: int = 1  # of each of them, from `seed` up


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw, adam, or muon: linear maps and convolutions by Muon, all else by AdamW
    learning_rate: float = 1e-3  # at the peak
    schedule: str = "cosine"  # after warm-up: cosine (to zero) or constant
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices and embeddings; biases, norms and the temperature have none; adam: 0
    beta1: float = 0.9  # beta1, beta2 and epsilon are Adam's
    beta2: float = 0.98
    epsilon: float = 1e-6
    clip_norm: float = 1.0  # of the global gradient; 0 = never
    rates: tuple[tuple[str, float], ...] = ()  # (regex of parameter names, factor of the rate; 0 = frozen), ...
    layer_decay: float = 1.0  # factor of the rate per layer above, in each tower
    ema: float = 0.0  # decay of a moving average of the parameters, per step; 0 = none is kept


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; one of them may be -1 = all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved."""

    every: int = 500  # steps
    keep: int = 2  # newest checkpoints kept; the best by hit@1 is kept beside them


@dataclass(frozen=True)
class Evaluation:
    """When the test split is ranked during training, and how pictures are embedded."""

    every: int = 0  # steps; 0 = only after the last one
    batch_size: int = 256
    ks: tuple[int, ...] = (1, 5, 10)  # depths k of hit@k, recall@k, P@k and nDCG@k
    # A picture's vector is the mean over the picture enlarged by each of these (1 = as it is), and over their mirror
    # images with `mirror`; search and re-rankers take the same
    zooms: tuple[float, ...] = (1.0,)
    mirror: bool = False


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = 0
    # towers; adapter: LoRA on the towers of model.init_from; rerank: a second stage on those of first_stage
    task: str = "towers"
    first_stage: str = ""  # workdir of the towers that a re-ranker works on; its catalogue is theirs unless set
    batch_size: int = 256  # pairs of a step, over all devices
    steps: int = 0  # length of the run, in steps ...
    epochs: float = 0.0  # ... or in passes over the training split; exactly one of the two
    log_every: int = 20  # steps between lines of metrics.jsonl
    data: Data = field(default_factory=Data)
    features: Features = field(default_factory=Features)
    incorrect_pairs: IncorrectPairs = field(default_factory=IncorrectPairs)
    augmentation: Augmentation = field(default_factory=Augmentation)
    model: Model = field(default_factory=Model)
    lora: LoRA = field(default_factory=LoRA)
    loss: Loss = field(default_factory=Loss)
    rerank: Rerank = field(default_factory=Rerank)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
