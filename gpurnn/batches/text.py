"""A text as inputs and targets, and as a part to train on and a part to validate."""

from gpurnn import validate
from gpurnn.batches.epoch import Batch, Ids

__all__ = ["shifted", "split"]


def shifted(ids: Ids) -> Batch:
    """Return inputs and targets of a whole text, ``(ids[:-1], ids[1:])``, as views.

    The target of every token is the one that follows: "machine" gives "machin" and "achine"
    (*Dive into Deep Learning*, section 9.4.3). ``ids`` is a one-dimensional integer array.

    Raises :class:`TypeError` or :class:`ValueError` if it is not, or has fewer than two tokens.
    """
    ids = validate.text_ids("ids", ids)
    if ids.size < 2:
        raise ValueError(f"ids must have at least 2 tokens, one and its target; got {ids.size}")
    return ids[:-1], ids[1:]


def split(ids: Ids, fraction: float) -> tuple[Ids, Ids]:
    """Split a text by position; return its first part, to train on, and the rest, to validate.

    The training part is the fraction ``fraction`` of the tokens, rounded to a whole number. Both
    parts are views of ``ids``, a one-dimensional integer array.

    Raises :class:`TypeError` or :class:`ValueError` if it is not, if ``fraction`` is not between
    0 and 1, or if one of the parts would be empty.
    """
    ids = validate.text_ids("ids", ids)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, both excluded; got {fraction!r}")
    at = round(fraction * ids.size)
    if not 0 < at < ids.size:
        raise ValueError(
            f"fraction={fraction!r} of {ids.size} tokens leaves {at} to train on and "
            f"{ids.size - at} to validate: both parts need at least one"
        )
    return ids[:at], ids[at:]
