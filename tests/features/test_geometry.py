"""Box geometry and intersection over union equal their definitions, also for boxes without area."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxclip.features.geometry import NAMES, box_geometry, iou

SHARES = arrays(np.float32, st.tuples(st.integers(0, 6), st.just(4)), elements=st.floats(0, 1, width=32))
PIXELS = st.integers(0, 12)


def ordered(corners):
    return np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], axis=1
    )


def test_known_boxes_have_the_expected_geometry():
    boxes = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.75, 0.75]], np.float32)
    expected = [[1, 1, 1, 0, 0.5, 0.5], [0.5, 0.25, 0.125, np.log(2), 0.5, 0.625]]
    np.testing.assert_allclose(box_geometry(boxes), expected, rtol=1e-6)
    assert len(NAMES) == box_geometry(boxes).shape[1]


@settings(deadline=None)
@given(SHARES)
def test_geometry_is_finite_and_swapping_width_and_height_negates_the_aspect(corners):
    boxes = ordered(corners)
    geometry, swapped = box_geometry(boxes), box_geometry(boxes[:, [1, 0, 3, 2]])
    assert geometry.shape == (len(boxes), 6) and geometry.dtype == np.float32
    assert np.isfinite(geometry).all()
    np.testing.assert_allclose(swapped, geometry[:, [1, 0, 2, 3, 5, 4]] * [1, 1, 1, -1, 1, 1], atol=1e-6)


@settings(deadline=None)
@given(st.tuples(*[PIXELS] * 4), st.tuples(*[PIXELS] * 4))
def test_iou_equals_the_ratio_of_counted_pixels(a, b):
    boxes = ordered(np.array([a, b], np.float32) / 12)
    masks = np.zeros((2, 12, 12), bool)
    for mask, (left, top, right, bottom) in zip(masks, (boxes * 12).round().astype(int), strict=True):
        mask[top:bottom, left:right] = True
    union = (masks[0] | masks[1]).sum()
    expected = (masks[0] & masks[1]).sum() / union if union else 0
    np.testing.assert_allclose(iou(boxes[:1], boxes[1:]), [[expected]], atol=1e-5)


def test_iou_is_computed_for_all_pairs_and_for_empty_arrays():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    np.testing.assert_allclose(iou(boxes, boxes[:2]), [[1, 0], [0, 1], [0.5, 0.5]])
    assert iou(boxes[:0], boxes).shape == (0, 3)
    assert box_geometry(boxes[:0]).shape == (0, 6)


def test_the_iou_of_boxes_without_area_is_zero():
    assert iou(np.array([[0.5, 0.5, 0.5, 0.5]]), np.array([[0.5, 0.5, 0.5, 0.5]])) == pytest.approx(0)
