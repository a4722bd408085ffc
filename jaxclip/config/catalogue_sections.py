"""The sections about the catalogue: where products come from, and what is computed for them before training."""

from dataclasses import dataclass

from jaxclip.catalog import captions
from jaxclip.catalog.product import AS_TEST, UNITS
from jaxclip.catalog.readers import READERS
from jaxclip.config import values
from jaxclip.config.declare import ABOVE_ZERO, at_least, key, section
from jaxclip.models.clip import CLIP_MEAN, CLIP_STD

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Columns:
    """Names of the columns, features or keys of a catalogue whose layout does not determine them."""

    id: str = key(
        "",
        "column of the product's identifier; '' = found by its usual names, or else made from the row's position",
    )
    image: str = key("", "column of the picture; '' = found by its usual names; not for webdataset")
    caption: str = key(
        "", "column of the caption; '' = found by its usual names; for webdataset, used if a sample has no text file"
    )
    category: str = key("", "column of the category; '' = found by its usual names")
    product: str = key(
        "",
        "column whose equal values make rows one product, with several pictures and captions; '' = rows with the same "
        "id and picture; only for table",
    )


@dataclass(frozen=True)
class Data:
    """Where the products come from, and how pictures and captions are prepared for the towers."""

    reader: str = key(
        "drawn", "layout of the raw catalogue; drawn: a catalogue that the program draws", choices=READERS
    )
    path: str = key("", "file or folder of the raw catalogue; '' for the drawn catalogue, or if data.prepared exists")
    sources: tuple[tuple[str, str, float], ...] = key(
        (),
        "several catalogues prepared as one, in place of data.reader and data.path: (reader, path, weight) of each; "
        "training draws products from each in proportion to its weight",
        check=values.sources,
    )
    prepared: str = key(
        "",
        "folder of the prepared dataset; '' = under $JAXCLIP_CACHE (default ~/.cache/jaxclip), reused for the same "
        "catalogue and settings",
    )
    queries: str = key(
        "",
        "file or folder of queries with judged products (CSV, JSON lines, Parquet, TREC, BEIR, ESCI, WANDS): evaluated "
        "as the protocol judged, and trained on with augmentation.queries",
    )
    product: str = key(
        "article",
        "what one product is in catalogues with several photos of an article: article (a product with all its photos) "
        "or photo (each photo is a product, as papers count; photos of an article are one group)",
        choices=UNITS,
    )
    split: str = key(
        "test",
        "products that an evaluation ranks: one split, or all",
        choices=("train", "validation", "test", "all"),
    )
    test: float = key(
        0.1, "products held back for testing, in whole groups: a number (>= 1) or a share (< 1)", limits=ABOVE_ZERO
    )
    validation: float = key(
        AS_TEST,
        "products held back for choosing checkpoints and settings, in whole groups: a number (>= 1) or a share (< 1); "
        "-1 = as many as for testing, 0 = none, and then there is no best checkpoint",
        limits=at_least(0),
    )
    train: int = key(
        0, "number of training products to use, always the same random choice; 0 = all of them", limits=at_least(0)
    )
    split_seed: int = key(
        42, "seed of the split; separate from seed, so that runs with different seeds have the same test products"
    )
    second_stage: float = key(
        0.0,
        "products of the training split held back from the towers to train a re-ranker, in whole groups: a number "
        "(>= 1) or a share (< 1); 0 = none",
        limits=at_least(0),
    )
    columns: Columns = section(Columns, only=("data.reader", ("table", "tfds", "webdataset")))
    drawn_products: int = key(4000, "number of products in the drawn catalogue", limits=at_least(1))
    drawn_seed: int = key(0, "seed of the drawn catalogue")
    picture: str = key(
        "",
        "what the towers see: the whole picture, or its first crop (see features); '' = as in model.init_from, or "
        "whole without it",
        choices=("", "whole", "crop"),
    )
    image_size: int = key(
        0,
        "side of the towers' square pictures, pixels; 0 = as in model.init_from, or 64 without it",
        limits=at_least(8),
    )
    resize: str = key(
        "squash",
        "squash: scale both sides to the square; crop: scale the shorter side and cut the centre, as CLIP does; random "
        "crops are always squashed",
        choices=("squash", "crop"),
        from_checkpoint=True,
    )
    resize_on: str = key(
        "auto",
        "where training scales pictures: host (Pillow), device, or auto: the device if it is a GPU or TPU, except with "
        "resize = crop without random crops, or if most pictures exceed three times image_size. With device, the host "
        "scales only crops that do not fit the squares that devices receive, which hold 95% of them where possible",
        choices=("auto", "host", "device"),
    )
    mean: RGB = key(
        CLIP_MEAN,
        "mean subtracted from the pixels, per channel (red, green, blue); pixels are from 0 to 1",
        from_checkpoint=True,
    )
    std: RGB = key(
        CLIP_STD,
        "standard deviation by which the pixels, minus the mean, are divided, per channel; pixels are from 0 to 1",
        limits=ABOVE_ZERO,
        from_checkpoint=True,
    )
    caption_template: str = key(
        captions.DEFAULT_TEMPLATE,
        "template of a product's caption: text with {name}, which is required, and {ATTRIBUTE} for any attribute",
        check=values.caption_template,
    )
    lowercase: bool = key(True, "whether texts are lowercased before they are tokenized", from_checkpoint=True)
    tokenizer: str = key(
        "",
        "folder of a Hugging Face tokenizer; '' = that of model.init_from, or without it a byte-level BPE trained on "
        "the training captions",
    )
    vocab_size: int = key(
        8192,
        "largest number of tokens in the vocabulary of the trained BPE",
        limits=at_least(258),
        from_checkpoint=True,
    )
    context_length: int = key(
        0,
        "tokens per text, including special tokens and padding; longer texts are cut off; 0 = as in "
        "model.init_from, or 32 without it",
        limits=at_least(4),
    )
    workers: int = key(
        0, "parallel workers that decode pictures or prepare products; 0 = chosen by the program", limits=at_least(0)
    )


@dataclass(frozen=True)
class Features:
    """What preparation computes for each product and stores with its picture."""

    detector: str = key(
        "foreground",
        "how products are located: none, foreground, faster_rcnn[:WEIGHTS], transformers:NAME, onnx:FILE or boxes:JSON",
        check=values.detector,
    )
    policy: str = key(
        "largest",
        "how crops are selected from the detected boxes: largest, confident (highest score), category (highest score "
        "with a label like the product's category) or all:K (the K highest scores)",
    )
    padding: float = key(
        0.05, "margin added on each side of a crop, as a share of the detected box's width or height (>= 0)"
    )
    colours: int = key(
        3, "number of dominant colours stored for the first crop, with their shares and names", limits=at_least(1)
    )


@dataclass(frozen=True)
class PairMining:
    """How incorrect pairs are mined: the text of another product for each training picture."""

    variant: str = key(
        "clustered",
        "how pairs are chosen: clustered (the paper's rule), random or below:T (cosine of the two pictures' features "
        "below T)",
        check=values.pair_variant,
    )
    clusters: int = key(10, "number of clusters of pictures, and of texts (variant clustered only)", limits=at_least(2))
    seed: int = key(0, "seed of the clustering and of the random choices")
    features: str = key(
        "classical",
        "features with which pictures and texts are compared: classical, towers:WORKDIR or encoders:VIT,BERT",
        check=values.pair_features,
    )
