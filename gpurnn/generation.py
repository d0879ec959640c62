"""Tokens that a language model makes up after given ones, wherever its parameters lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import functional as F
from gpurnn import planning, validate
from gpurnn.cuda import generation
from gpurnn.cuda.arrays import beside, on_host
from gpurnn.functional.placing import placed
from gpurnn.planning import Group
from gpurnn.sampling import TokenSampler

if TYPE_CHECKING:
    from gpurnn.language_model import LanguageModel

__all__ = ["continuation", "generated"]

Floats = NDArray[Any]
Ids = NDArray[Any]


def generated(
    model: LanguageModel,
    prefixes: Sequence[Ids],
    n: int,
    sampler: TokenSampler,
    kernel: str | Group | None = None,
) -> Ids:
    """Continue each of the prefixes, see ``LanguageModel.generated``."""
    validate.at_least("n", n, 0)
    if kernel is not None and not isinstance(kernel, Group):
        validate.choice("kernel", kernel, planning.GENERATORS)
    checked = [_prefix(f"prefixes[{i}]", prefix, model) for i, prefix in enumerate(prefixes)]
    engine, arrays, place = placed(dict(model.params))
    if engine is None and kernel is not None:
        raise ValueError(
            f"kernel is {kernel!r} but the parameters are numpy.ndarrays: kernels take arrays on a "
            "GPU, or NumPy's within gpurnn.emulated()"
        )
    first = sampler.count
    if engine is None:
        rows = np.empty((len(checked), n), np.int64)
        for row, prefix in enumerate(checked):
            for i, token in enumerate(
                continuation(model, prefix, n, _drawing(sampler, first, row))
            ):
                rows[row, i] = token
        sampler.count = first + n
        return rows
    params = dict(zip(model.params, arrays, strict=True))
    activation = validate.activation(model.rnn.activation)
    validate.supported(activation, params["W_hq"], "W_hq", place)
    layers = model.rnn.num_layers
    try:
        found = generation.generate(
            engine, kernel, params, layers, activation, checked, n, sampler, first
        )
    except ValueError:  # as on NumPy, what spoilt the logits is named before they are
        validate.refuse_non_finite({name: on_host(a) for name, a in params.items()})
        raise
    sampler.count = first + n
    return found


def continuation(
    model: LanguageModel, prefix: Ids, n: int, draw: Callable[[Floats], int]
) -> Iterator[int]:
    """Yield n ids after the prefix (N,), each drawn on the host from its logits (q,)."""
    if n == 0:
        return
    X, E = beside(prefix[:, None], model.params["W_hq"]), model.params.get("E")
    H, state = model.rnn(X if E is None else F.embedding(X, E))
    O = F.linear(H[-1], model.params["W_hq"], model.params.get("b_q"))
    for i in range(n):
        token = draw(on_host(O[0]))
        yield token
        if i + 1 < n:
            state, O = model.step(np.array([token]), state)


def _drawing(sampler: TokenSampler, first: int, row: int) -> Callable[[Floats], int]:
    numbers = iter(range(first, 1 << 62))
    return lambda O: sampler.draw(O, number=next(numbers), row=row)


def _prefix(name: str, prefix: Ids, model: LanguageModel) -> Ids:
    ids = validate.text_ids(name, prefix)
    if not len(ids):
        raise ValueError(f"{name} has shape {ids.shape}: expected at least one id")
    return validate.token_ids(name, ids, len(model.vocabulary), "the vocabulary", axis="tokens")
