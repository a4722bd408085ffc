"""Every mistake in a detector's specification is a UserError that says what would be right."""

import sys

import pytest

from jaxclip.errors import UserError
from jaxclip.features.detect import DETECTORS, make_detector


def test_the_error_for_an_unknown_detector_lists_the_known_ones():
    with pytest.raises(UserError, match=", ".join(DETECTORS)):
        make_detector("yolo:x.onnx")


@pytest.mark.parametrize("spec", ["onnx", "boxes", "transformers", "foreground:x"])
def test_the_error_for_a_bad_argument_names_the_detector(spec):
    with pytest.raises(UserError, match=spec.partition(":")[0]):
        make_detector(spec)


@pytest.mark.parametrize(
    ("spec", "library"), [("faster_rcnn", "torch"), ("transformers:x", "torch"), ("onnx:x.onnx", "onnxruntime")]
)
def test_the_error_for_a_missing_library_says_what_to_install(monkeypatch, spec, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}; .*pip install 'jaxclip\[detect\]'"):
        make_detector(spec)
