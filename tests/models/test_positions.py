"""Position embeddings are resized to another context length."""

import numpy as np

from jaxclip.models.weights.positions import resize_context


def test_resizing_to_a_longer_context_keeps_the_first_positions_and_stretches_the_others():
    positions = np.random.default_rng(0).normal(size=(77, 3)).astype(np.float32)
    longer = resize_context(positions, (248, 3))
    np.testing.assert_array_equal(longer[:20], positions[:20])
    np.testing.assert_allclose(longer[[20, -1]], positions[[20, -1]], atol=1e-6)
    places = np.linspace(20, 76, 228)
    expected = np.stack([np.interp(places, np.arange(77), column) for column in positions.T], axis=1)
    np.testing.assert_allclose(longer[20:], expected, atol=1e-5)
    np.testing.assert_array_equal(resize_context(positions, (30, 3)), positions[:30])
