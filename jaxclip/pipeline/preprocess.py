"""Preprocessing of pictures and captions, which training saves and evaluation loads."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from jaxclip.errors import UserError
from jaxclip.runtime import files

FILENAME = "preprocess.json"


@dataclass(frozen=True)
class Preprocess:
    """The contents of a workdir's preprocess.json.

    Attributes:
      image_size: side of the square pictures, in pixels.
      resize: "squash" scales both sides to `image_size`; "crop" scales the shorter side to it and cuts out the centre.
      filter: resizing filter, "bicubic" or "bilinear", with antialiasing.
      picture: "whole", or "crop" for the best crop that preparation stored.
      mean, std: of each colour channel, on a scale of [0, 1]; the image tower normalises with them.
      caption_template: template for `catalog.captions.build`.
      lowercase: whether captions are lowercased before they are tokenized.
      context_length: number of tokens per caption, including padding and both special tokens.
    """

    image_size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    caption_template: str
    lowercase: bool
    context_length: int
    filter: str = "bicubic"
    picture: str = "whole"

    def save(self, workdir: Path) -> None:
        """Writes preprocess.json into the workdir."""
        files.write_json(workdir / FILENAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, workdir: Path) -> "Preprocess":
        """Returns the contents of the workdir's preprocess.json; UserError if the file is missing or invalid."""
        path = workdir / FILENAME
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: {workdir} is not a complete workdir; give the workdir of a run"
            ) from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is not a preprocess.json of this version ({error}): restore the file, or train the run again"
            ) from None
