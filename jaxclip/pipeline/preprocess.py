"""How a picture and a caption reach the towers, as training fixed it and evaluation reads it back."""

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
      image_size: side of the square pictures, pixels.
      resize: "squash" to the square, or "crop": the shorter side to the size, then the centre.
      filter: of the resizing, with antialiasing.
      picture: "whole", or "crop": the first part of it that preparation cut out.
      mean, std: of the pixels' channels in [0, 1]; the image tower applies them.
      caption_template: as `catalog.captions.build` takes it.
      lowercase: whether captions are lowercased before they are tokenized.
      context_length: tokens of a caption, padding and both special tokens included.
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
        """Returns what the workdir's run was trained with; UserError where the file is missing or of another form."""
        path = workdir / FILENAME
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {workdir} is not a complete workdir") from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a preprocess.json of this version: {error}") from None
