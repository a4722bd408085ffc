"""Token ids as of real captions, for benchmarks: their lengths and repeated ids decide what some gradients cost."""

import numpy as np

CAPTION, SPREAD, WORDS = 12, 3, 2000
"""Mean number of tokens in a realistic caption, its standard deviation, and the number of different words."""


def captions(count: int, length: int, vocabulary: int) -> np.ndarray:
    """Returns token ids, (count, length) int32, as of real captions: start, words, then end tokens as padding.

    As in CLIP's vocabulary, the start token has the last id but one and the end token the last. Captions have about
    CAPTION tokens. The n-th most frequent of WORDS words has a probability in proportion to 1 / n.
    """
    random = np.random.default_rng(0)
    words = random.permutation(vocabulary - 2)[:WORDS].astype(np.int32)
    weights = 1 / np.arange(1, len(words) + 1)
    ids = random.choice(words, (count, length), p=weights / weights.sum())
    ids[:, 0] = vocabulary - 2
    lengths = np.clip(np.rint(random.normal(CAPTION, SPREAD, count)), 3, length).astype(int)  # with start and end
    ids[np.arange(length) >= lengths[:, None] - 1] = vocabulary - 1
    return ids
