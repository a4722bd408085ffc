"""Backgrounds of product photos."""

import numpy as np

from jaxclip.catalog.drawn.chance import Chance

_PASTELS = ((250, 236, 230), (232, 242, 250), (236, 246, 234), (246, 240, 224), (240, 234, 248), (226, 240, 240))


def choose_background(chance: Chance) -> str:
    """Returns a random kind of background: "white" (the most likely), "grey", "pastel" or "linen"."""
    number = chance.between(1, 100)
    return "white" if number <= 62 else "grey" if number <= 78 else "pastel" if number <= 90 else "linen"


def paint_background(kind: str, chance: Chance, height: int, width: int) -> np.ndarray:
    """Returns the picture of a background of this kind without a product, (height, width, 3) int32, 0 to 255."""
    if kind == "white":
        return np.full((height, width, 3), 255, np.int32)
    y, x = np.mgrid[0:height, 0:width]
    if kind == "grey":
        middle, lightest = chance.between(height // 3, height // 2), chance.between(238, 248)
        distance = (x - width // 2) ** 2 + (y - middle) ** 2
        level = lightest - distance * 44 // (width**2 // 4 + height**2 // 2)
        return np.stack([level, level, level + 2], axis=2).astype(np.int32)
    pastel = np.array(chance.pick(_PASTELS), np.int32)
    if kind == "pastel":
        falling = 3 - y * 10 // height
        return np.clip(pastel + falling[:, :, None], 0, 255).astype(np.int32)
    thread = _noise(y, x // 6, chance.between(0, 9999)) + _noise(y // 6, x, chance.between(0, 9999))
    return np.clip(pastel - 10 + (thread // 16)[:, :, None], 0, 255).astype(np.int32)


def _noise(row: np.ndarray, column: np.ndarray, seed: int) -> np.ndarray:
    mixed = (row * 374_761_393 + column * 668_265_263 + seed * 2_147_483_647) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1_274_126_177) & 0xFFFFFFFF
    return (mixed >> 16) % 160 - 80
