"""Records are read by number, from a whole split or a selection."""

import numpy as np

from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.records import Records


def test_taken_records_are_renumbered_and_keep_their_original_numbers(prepared, preprocess):
    records = Records(prepared, "train")
    chosen = np.array([4, 17, 2])
    taken = records.take(chosen)
    assert len(taken) == 3 and len(records) == 19 and taken.numbers.tolist() == [4, 17, 2]
    assert [p.id for p, _ in taken.products()] == [[p.id for p, _ in records.products()][row] for row in chosen]
    assert taken.pictures(1) == records.pictures(17)
    assert taken.take(np.array([2, 0])).numbers.tolist() == [2, 4]
    whole = np.concatenate(list(image_batches(records, preprocess, batch_size=19)))
    np.testing.assert_array_equal(np.concatenate(list(image_batches(taken, preprocess, batch_size=3))), whole[chosen])
