"""Builds CLIP's tokenizer from the vocabulary file that OpenAI published."""

import gzip
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from jaxclip.errors import UserError

SUFFIX = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49_152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(path: Path) -> CLIPTokenizer:
    """Returns CLIP's tokenizer of 49,408 ids; `path` is OpenAI's bpe_simple_vocab_16e6.txt.gz.

    Ids are assigned, in this order, to the bytes, the bytes that end a word, the merges, and the two special tokens
    (Radford et al. 2021, simple_tokenizer.py).

    Raises:
      UserError: the file is unreadable or is not that vocabulary.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not OpenAI's {SUFFIX}: {error}") from None
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
    if len(merges) < MERGES or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} is not OpenAI's {SUFFIX}: the file should list {MERGES:,} merges of two symbols each")
    symbols = [*_bytes()]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def _bytes() -> list[str]:
    """Returns the symbols of the 256 bytes, printable ones first, as GPT-2 orders them."""
    symbols = set(pre_tokenizers.ByteLevel.alphabet())
    printable = sorted(symbol for symbol in symbols if ord(symbol) < 256)
    return printable + sorted(symbols - set(printable))
