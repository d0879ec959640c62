"""Both sides must compute the same, or nothing is timed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIRST", "GREEDY", "LATER", "LOGITS", "UPDATES", "check_greedy", "check_losses"]

UPDATES = 4  # whose losses are compared: the last depends on gradients, clipping and Adam
GREEDY = 50  # characters whose greedy choice is compared

FIRST = {"ieee": 1e-5, "tf32": 1e-3}
LATER = {"ieee": 1e-4, "tf32": 5e-2}
"""Largest difference of the first update's loss, as a part of it, and of those after it.

Adam's first steps are as long for a small gradient as for a large one, so that rounding grows: with
weights rounded to TF32 the fourth loss at T 128, n 64, h 1024 is off by 1e-2, that at h 32 by 4e-6.
A learning rate that is wrong by a tenth changes them by 1e-4 and more.
"""
LOGITS = {"ieee": 1e-4, "tf32": 5e-3}
"""Largest difference of a logit, as a part of the largest one."""


def check_losses(found: Sequence[float], exact: Sequence[float], precision: str) -> dict[str, Any]:
    """Compare the losses of the first updates; return differences as a part of the loss, limits.

    Raises:
        ArithmeticError: a difference is above its limit, or NaN.
    """
    a, b = np.asarray(found), np.asarray(exact)
    errors = np.abs(a - b) / np.abs(b)
    first, later = float(errors[0]), float(np.max(errors[1:]))  # unlike max(), it passes a NaN on
    if not (first <= FIRST[precision] and later <= LATER[precision]):
        raise ArithmeticError(
            f"losses of the first updates {_listed(found)}, expected {_listed(exact)}: not timed"
        )
    return {
        "updates_compared": len(found),
        "error": first,
        "error_limit": FIRST[precision],
        "error_later": later,
        "error_later_limit": LATER[precision],
    }


def check_greedy(
    O: NDArray[Any], ids: NDArray[Any], never: Sequence[int], precision: str
) -> dict[str, Any]:
    """Hold our greedy choices against another side's logits.

    Args:
        O: (K, n, q), the other side's logits before each of our characters, fed with those.
        ids: (K, n), our characters.
        never: ids that are not chosen.
        precision: whose limit holds.

    Returns:
        "characters" compared; "equal", the number of rows in which the other side would have
        chosen all of them; "part_at", the first character that it would have chosen otherwise in
        some row, or None; "gap", the largest difference between its best logit and that of our
        choice, as a part of its largest one: rounding makes it, and the texts part there; and
        "gap_limit".

    Raises:
        ArithmeticError: the gap is more than rounding, or NaN.
    """
    allowed = np.delete(O, list(never), axis=2)
    chosen = np.take_along_axis(O, ids[:, :, None], axis=2)[:, :, 0]
    gaps = allowed.max(axis=2) - chosen
    worst = float(np.max(gaps) / np.abs(allowed).max())  # unlike max(), it passes a NaN on
    if not worst <= LOGITS[precision]:
        t, row = np.unravel_index(int(np.argmax(gaps)), gaps.shape)
        raise ArithmeticError(
            f"greedy output differs at character {t} of row {row}: the logit of ours is {worst:.2e}"
            " of the largest below the best one: not timed"
        )
    parted = gaps > 0
    return {
        "characters": len(ids),
        "rows": ids.shape[1],
        "equal": int((~parted.any(axis=0)).sum()),
        "part_at": int(np.argmax(parted.any(axis=1))) if parted.any() else None,
        "gap": worst,
        "gap_limit": LOGITS[precision],
    }


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)
