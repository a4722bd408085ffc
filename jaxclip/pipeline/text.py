"""Turns names and attributes into captions, and captions into token ids."""

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, SiglipTokenizer

from jaxclip.catalog import captions
from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError, first_line
from jaxclip.pipeline.clip_tokenizer import clip_tokenizer
from jaxclip.pipeline.preprocess import Preprocess

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_DRAWS = 40  # random numbers per caption, see `augmented_caption`
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
PUNCTUATION = f"[{re.escape(string.punctuation)}]"  # regular expression
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SINGLE_FILE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that tokenizer.json describes completely; the second is the new name of the first."""
TRANSIENT_SETTINGS = (
    "max_length",
    "stride",
    "truncation_strategy",
    "pad_to_multiple_of",
    "is_local",
    "local_files_only",
)
"""Settings that only record how a tokenizer was last loaded or used; they are not saved."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on the texts (Sennrich et al. 2016); it encodes any text.

    It has at most `vocab_size` tokens (but at least all bytes), which include CLIP's start and end tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (START, END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END)


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """Returns the Hugging Face tokenizer in a folder, or CLIP's from OpenAI's vocabulary file (*.txt.gz).

    A folder with vocab.json but without any of TOKENIZER_FILES is read as CLIP's tokenizer. Code in a folder is never
    run.

    Raises:
      UserError: there is no tokenizer, or it does not end captions with an end token, which the text tower needs.
    """
    try:
        if source.name.endswith(".txt.gz"):
            tokenizer = clip_tokenizer(source)
        elif (source / "vocab.json").exists() and not any((source / name).exists() for name in TOKENIZER_FILES):
            tokenizer = CLIPTokenizer.from_pretrained(str(source), local_files_only=True)
        elif _class_of(source) in SINGLE_FILE_CLASSES:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source), local_files_only=True)
        else:
            from transformers import AutoTokenizer  # imports PyTorch if it is installed, which takes seconds and 0.5 GB

            tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source} has no Hugging Face tokenizer: {first_line(error)}") from None
    except ImportError:
        raise UserError(f"the tokenizer in {source} needs sentencepiece: pip install sentencepiece") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None or encode(tokenizer, ["a " * 99], 8)[0, -1] != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer in {source} does not put an end token after a caption, as CLIP's does: "
            "set data.tokenizer to one that does"
        )
    return tokenizer


def _class_of(source: Path) -> str:
    """Returns the tokenizer_class in a folder's tokenizer_config.json; "" if the file or the entry is missing."""
    path = source / "tokenizer_config.json"
    return str(json.loads(path.read_text()).get("tokenizer_class", "")) if path.is_file() else ""


def add_cleaning(tokenizer: PreTrainedTokenizerBase, cleaning: str) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that also cleans captions as open_clip does before tokenizing.

    "lower" lower-cases; "canonicalize" (SigLIP) also removes ASCII punctuation and repeated spaces, and replaces "_"
    by a space; "whitespace" changes nothing, because the tokenizers used with it ignore repeated spaces. `tokenizer`
    may be modified.

    Raises:
      UserError: the tokenizer is implemented in Python, so that no normalizer can be added to it.
    """
    if cleaning == "whitespace" or isinstance(tokenizer, SiglipTokenizer):  # SigLIP's class already canonicalizes
        return tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"a {type(tokenizer).__name__} cannot clean captions ({cleaning}): add a tokenizer.json to the checkpoint"
        )
    backend, steps = tokenizer.backend_tokenizer, [normalizers.Lowercase()]
    if cleaning == "canonicalize":
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(PUNCTUATION), ""),
            *steps,
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    # Not the tokenizer's original class: some classes, such as T5's, replace the normalizer when they are loaded.
    tokens = {name: str(token) for name in SPECIAL_TOKENS if (token := getattr(tokenizer, name))}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, padding_side="right", **tokens
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer into a folder, without the truncation and padding that `encode` set."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    for setting in TRANSIENT_SETTINGS:
        tokenizer.init_kwargs.pop(setting, None)
    tokenizer.save_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context_length: int) -> np.ndarray:
    """Returns the token ids, (n, context_length) int32, padded; long captions are truncated before the end token."""
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=context_length)
    return np.asarray(encoded["input_ids"], np.int32)


@dataclass(frozen=True, eq=False)
class TokenSegments:
    """Captions split into M segments that each fit the context length; a caption that fits it is one segment.

    Attributes:
      ids: (M, context_length) int32 token ids of each segment with its start and end tokens, padded.
      owners: (M,) index of the caption that each segment belongs to, ascending.
      lengths: (M,) number of tokens in each segment that are not padding; its start and end tokens count.
    """

    ids: np.ndarray
    owners: np.ndarray
    lengths: np.ndarray


def segments(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context_length: int, limit: int
) -> TokenSegments:
    """Returns the segments of captions, at most `limit` per caption; the rest of a longer caption is dropped."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=context_length,
        return_overflowing_tokens=True,
        return_attention_mask=True,
    )
    owners = np.asarray(encoded["overflow_to_sample_mapping"])
    kept = np.arange(len(owners)) - np.searchsorted(owners, owners) < limit
    ids, attention = (np.asarray(encoded[name], np.int32)[kept] for name in ("input_ids", "attention_mask"))
    return TokenSegments(ids, owners[kept], attention.sum(axis=1))


def caption(name: str, attributes: Mapping[str, str], preprocess: Preprocess) -> str:
    """Returns the text that evaluation embeds: the caption template, filled with `name` and the attributes.

    `name` is any of a product's captions, or a query; a query has no attributes.
    """
    return _apply_case(captions.build(name, attributes, preprocess.caption_template), preprocess)


def prompts(name: str, preprocess: Preprocess) -> list[str]:
    """Returns OpenFashionCLIP's prompts for a name, for prompt ensembles."""
    return [_apply_case(captions.build(name, {}, prompt), preprocess) for prompt in captions.PROMPTS]


def augmented_caption(
    name: str, attributes: Mapping[str, str], preprocess: Preprocess, augmentation: Augmentation, draws: np.ndarray
) -> str:
    """Returns the caption with attributes and words of the name left out at random, for training.

    With `augmentation.prompts`, a random prompt of OpenFashionCLIP replaces the template. `draws` are MAX_DRAWS uniform
    numbers in [0, 1): one that chooses the prompt, then one for each attribute of the template, then one for each word
    of the name. Words without a draw are kept, and at least one word is always kept.
    """
    kept = [(draws < keep).tolist() for keep in (augmentation.keep_attributes, augmentation.keep_words)]
    return _augmented_caption(name, attributes, preprocess, augmentation, draws, *kept)


def augmented_captions(
    names: Sequence[bytes],
    attributes: Sequence[bytes],
    preprocess: Preprocess,
    augmentation: Augmentation,
    draws: Float[np.ndarray, "n D"],
) -> list[str]:
    """Returns the augmented captions of n names, each with its attributes as a JSON object."""
    kept = [(draws < keep).tolist() for keep in (augmentation.keep_attributes, augmentation.keep_words)]
    return [
        _augmented_caption(name.decode(), json.loads(values), preprocess, augmentation, *row)
        for name, values, *row in zip(names, attributes, draws, *kept, strict=True)
    ]


def _augmented_caption(
    name: str,
    attributes: Mapping[str, str],
    preprocess: Preprocess,
    augmentation: Augmentation,
    draws: np.ndarray,
    keep_attribute: Sequence[bool],
    keep_word: Sequence[bool],
) -> str:
    """Returns the augmented caption; `keep_attribute` and `keep_word` say which draws keep an attribute or a word."""
    template = preprocess.caption_template
    if augmentation.prompts:
        template = captions.PROMPTS[int(draws[0] * len(captions.PROMPTS))]
    fields = captions.fields(template)
    kept = [field for field, keep in zip(fields, keep_attribute[1:], strict=False) if keep]
    words = name.split()
    if augmentation.keep_words < 1:
        keep_word = keep_word[1 + len(fields) :]
        kept_words = [word for i, word in enumerate(words) if i >= len(keep_word) or keep_word[i]]
        words = kept_words or words[int(draws[0] * len(words)) :][:1]
    return _apply_case(captions.build(" ".join(words), attributes, template, kept), preprocess)


def _apply_case(text: str, preprocess: Preprocess) -> str:
    return text.lower() if preprocess.lowercase else text
