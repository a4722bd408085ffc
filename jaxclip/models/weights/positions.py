"""Resizes position embeddings to other picture sizes and context lengths than those of a checkpoint."""

import math

import numpy as np

from jaxclip.errors import UserError

CUBIC_COEFFICIENT = -0.75
"""The parameter a of torch's bicubic kernel (Keys 1981)."""
UNCHANGED_POSITIONS = 20
"""Number of first text positions that are not stretched: few captions in CLIP's training were longer (Zhang et al.
2024, arXiv:2403.15378)."""


def resize_grid(positions: np.ndarray, shape: tuple[int, ...], *, class_token: bool) -> np.ndarray:
    """Returns the position embeddings of a square grid of patches, resized to another square grid.

    The result equals that of torch.nn.functional.interpolate with mode="bicubic" and align_corners=False, which
    transformers' interpolate_pos_encoding calls.

    Args:
      positions: the checkpoint's embeddings (number of positions, width).
      shape: shape of the result: (new number of positions, width).
      class_token: whether the first position is that of a class token, which does not change.

    Raises:
      UserError: the checkpoint's positions do not form a square grid.
    """
    before, after = (math.isqrt(rows - class_token) for rows in (len(positions), shape[0]))
    if before**2 != len(positions) - class_token:
        raise UserError(
            f"the checkpoint's {len(positions)} image positions do not form a square grid: "
            "give a checkpoint for square pictures"
        )
    if before == after:
        return positions
    class_position, grid = positions[: int(class_token)], positions[int(class_token) :].reshape(before, before, -1)
    weights = bicubic(before, after)
    resized = np.einsum("ai,bj,ijw->abw", weights, weights, grid.astype(np.float64), optimize=True)
    return np.concatenate([class_position, resized.reshape(after * after, -1).astype(positions.dtype)])


def resize_context(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the position embeddings of captions, resized to another context length.

    A shorter context takes the first positions. A longer context keeps the first 20 (all but the last if there are no
    more than 20) and stretches the others linearly, with their ends aligned, as in Long-CLIP (Zhang et al. 2024,
    arXiv:2403.15378).

    Args:
      positions: the checkpoint's embeddings (context length, width).
      shape: shape of the result: (new context length, width).
    """
    before, after = len(positions), shape[0]
    if after <= before:
        return positions[:after]
    unchanged = min(UNCHANGED_POSITIONS, before - 1)
    sources = np.linspace(unchanged, before - 1, after - unchanged)
    low = np.minimum(sources.astype(int), before - 2)
    share = (sources - low)[:, None].astype(positions.dtype)
    stretched = positions[low] * (1 - share) + positions[low + 1] * share
    return np.concatenate([positions[:unchanged], stretched])


def bicubic(before: int, after: int) -> np.ndarray:
    """Returns the (after, before) weights of torch's bicubic interpolation along one axis, without antialiasing."""
    weights = np.zeros((after, before))
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    first, a = np.floor(centres).astype(int), CUBIC_COEFFICIENT
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        np.add.at(weights, (np.arange(after), np.clip(first + tap, 0, before - 1)), np.where(distance <= 1, near, far))
    return weights
