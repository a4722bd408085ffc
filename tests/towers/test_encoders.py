"""Equal captions are embedded once, so their embeddings are equal."""

import jax
import numpy as np

from jaxclip import config
from jaxclip.pipeline.text import encode as encode_captions
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.towers import make_preprocess, make_towers


def test_equal_captions_are_embedded_once_and_have_equal_embeddings():
    configuration = config.build({"steps": 1, "data": {"context_length": 16}, "model": {"preset": "tiny"}})
    tokenizer = train_tokenizer(["a red shirt", "a blue watch"], 300)
    towers = make_towers(configuration, make_preprocess(configuration), tokenizer)
    encoders, batches = Encoders(towers, batch_size=8), []

    def encode(params, ids):
        """Stands in for the tower: as with rounding errors, an embedding depends on its row in the batch."""
        batches.append(np.asarray(ids))
        return batches[-1] + np.arange(len(ids), dtype=np.float32)[:, None] / 100

    encoders.text = encode
    captions = ["blue watch", "red shirt", "blue watch", "blue shirt", "red", "watch", "red", "blue watch", "watch"]
    with jax.set_mesh(towers.mesh):
        rows = encoders.captions({}, captions)
    ids = encode_captions(tokenizer, captions, 16)
    np.testing.assert_array_equal(np.floor(rows), ids)
    assert len(batches) == 1 and len({tuple(row) for row in batches[0]}) == 5
    assert len({tuple(row) for row in rows}) == 5
