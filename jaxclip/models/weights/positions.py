"""Position embeddings for other sizes than those a checkpoint was trained with."""

import math

import numpy as np

from jaxclip.errors import UserError

CUBIC = -0.75
"""The parameter of torch's bicubic kernel (Keys 1981)."""
KEPT = 20
"""First positions of captions that stay as they are: in CLIP's training few captions were longer (Long-CLIP)."""


def resize_grid(positions: np.ndarray, shape: tuple[int, ...], *, class_token: bool) -> np.ndarray:
    """Returns the (T, W) positions of a square grid of tokens for `shape`, another grid's.

    The grid is interpolated as torch.nn.functional.interpolate does with mode="bicubic", align_corners=False, which is
    what transformers' interpolate_pos_encoding calls; the class token's position, the first one, stays.

    Raises:
      UserError: the positions are no square grid.
    """
    before, after = (math.isqrt(rows - class_token) for rows in (len(positions), shape[0]))
    if before**2 != len(positions) - class_token:
        raise UserError(f"the checkpoint's {len(positions)} positions of pictures are no square grid")
    if before == after:
        return positions
    kept, grid = positions[: int(class_token)], positions[int(class_token) :].reshape(before, before, -1)
    weights = bicubic(before, after)
    resized = np.einsum("ai,bj,ijw->abw", weights, weights, grid.astype(np.float64), optimize=True)
    return np.concatenate([kept, resized.reshape(after * after, -1).astype(positions.dtype)])


def resize_context(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the (T, W) positions of captions for another length.

    A shorter one takes the first positions. A longer one keeps the first 20 and stretches the others linearly over the
    rest, their ends aligned, as Long-CLIP does (Zhang et al. 2024, arXiv:2403.15378).
    """
    before, after = len(positions), shape[0]
    if after <= before:
        return positions[:after]
    kept = min(KEPT, before - 1)
    places = np.linspace(kept, before - 1, after - kept)
    low = np.minimum(places.astype(int), before - 2)
    share = (places - low)[:, None].astype(positions.dtype)
    stretched = positions[low] * (1 - share) + positions[low + 1] * share
    return np.concatenate([positions[:kept], stretched])


def bicubic(before: int, after: int) -> np.ndarray:
    """Returns the (after, before) weights of torch's bicubic interpolation along one axis, without antialiasing."""
    weights = np.zeros((after, before))
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    first = np.floor(centres).astype(int)
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
        np.add.at(weights, (np.arange(after), np.clip(first + tap, 0, before - 1)), np.where(distance <= 1, near, far))
    return weights
