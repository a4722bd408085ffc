"""The sections about the catalogue: where products come from, and what is computed of them before training."""

from dataclasses import dataclass

from jaxclip.catalog import captions
from jaxclip.catalog.readers import READERS
from jaxclip.config import values
from jaxclip.config.declare import ABOVE_ZERO, at_least, key, section
from jaxclip.models.clip import CLIP_MEAN, CLIP_STD

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Columns:
    """Names of the columns, features or keys of a catalogue whose layout does not fix them."""

    id: str = key("", "column of the product's identifier; '' = its usual names")
    image: str = key("", "column of the picture; '' = its usual names")
    caption: str = key("", "column of the caption; '' = its usual names")
    category: str = key("", "column of the category; '' = its usual names")


@dataclass(frozen=True)
class Data:
    """Where the products come from, and how a picture and a caption reach the towers."""

    reader: str = key("drawn", "layout of the raw catalogue; drawn: pictures drawn by the program", choices=READERS)
    path: str = key("", "file or folder of the raw catalogue; the drawn one has none")
    prepared: str = key("", "folder of the prepared dataset; '' = under $JAXCLIP_CACHE, found again by its content")
    split: str = key("test", "products that an evaluation ranks", choices=("train", "test", "all"))
    test: float = key(
        0.1, "products held back for testing, in whole groups: a number (>= 1) or a share (< 1)", limits=ABOVE_ZERO
    )
    train: int = key(
        0, "number of training products used, always the same random choice; 0 = all of them", limits=at_least(0)
    )
    split_seed: int = key(42, "seed of the split only, so that runs with other seeds share their test products")
    second_stage: float = key(
        0.0,
        "products of the training split held back from the towers to train a re-ranker: a number (>= 1) or a share "
        "(< 1)",
        limits=at_least(0),
    )
    columns: Columns = section(Columns, only=("data.reader", ("table", "tfds", "webdataset")))
    drawn_products: int = key(4000, "number of products in the drawn catalogue", limits=at_least(1))
    drawn_seed: int = key(0, "seed of the drawn catalogue")
    picture: str = key(
        "",
        "what the towers see: the whole picture, or its first crop by `features`; '' = as model.init_from, else whole",
        choices=("", "whole", "crop"),
    )
    image_size: int = key(
        0, "side of the towers' square pictures, pixels; 0 = as model.init_from, else 64", limits=at_least(8)
    )
    resize: str = key(
        "squash",
        "squash: scale both sides to the square; crop: scale the shorter side and cut the centre, as CLIP does",
        choices=("squash", "crop"),
        from_checkpoint=True,
    )
    resize_on: str = key(
        "auto",
        "where training scales pictures: host (Pillow), device (so that the host only decodes), or auto: on a GPU or "
        "TPU, unless the catalogue has pictures more than six times as long as image_size",
        choices=("auto", "host", "device"),
    )
    mean: RGB = key(
        CLIP_MEAN, "mean subtracted from the pixels, per channel (red, green, blue), in [0, 1]", from_checkpoint=True
    )
    std: RGB = key(
        CLIP_STD,
        "standard deviation that the pixels are divided by, per channel, in [0, 1]",
        limits=ABOVE_ZERO,
        from_checkpoint=True,
    )
    caption_template: str = key(
        captions.DEFAULT_TEMPLATE,
        "wording of a product's caption: text with {name} and {ATTRIBUTE} in it",
        check=values.caption_template,
    )
    lowercase: bool = key(True, "whether texts are lowercased before they become tokens", from_checkpoint=True)
    tokenizer: str = key(
        "", "folder of a Hugging Face tokenizer; '' = a byte-level BPE trained on the training captions"
    )
    vocab_size: int = key(8192, "tokens in the trained BPE", limits=at_least(258), from_checkpoint=True)
    context_length: int = key(
        0,
        "tokens of a text, the two special ones included; 0 = as model.init_from, else 32",
        limits=at_least(4),
    )
    workers: int = key(
        0, "number of parallel decoders, and of preparing processes; 0 = chosen by the program", limits=at_least(0)
    )


@dataclass(frozen=True)
class Features:
    """What preparation computes of each product and stores with its picture."""

    detector: str = key(
        "foreground",
        "what finds the product: none, foreground, faster_rcnn[:WEIGHTS], transformers:NAME, onnx:FILE or boxes:JSON",
        check=values.detector,
    )
    policy: str = key("largest", "which detected boxes become crops: largest, confident, category or all:K")
    padding: float = key(0.05, "margin added on each side of a crop, as a share of its box (>= 0)")
    colours: int = key(3, "dominant colours stored of the first crop, with their shares and names", limits=at_least(1))


@dataclass(frozen=True)
class PairMining:
    """How the incorrect pairs are mined: the wrong text that each training picture is also shown with."""

    variant: str = key(
        "clustered",
        "how pairs are chosen: clustered (the paper's rule), random or below:T (cosine of the two pictures below T)",
        check=values.pair_variant,
    )
    clusters: int = key(10, "number of clusters of pictures, and of texts (variant clustered only)", limits=at_least(2))
    seed: int = key(0, "seed of the clusters and of the draws")
    features: str = key(
        "classical",
        "vectors by which pictures and texts are compared: classical, towers:WORKDIR or encoders:VIT,BERT",
        check=values.pair_features,
    )
