"""Texts of a language model in one launch: pack the weights, plan, launch, look at what came."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpurnn import philox
from gpurnn.activation import Activation, AnyActivation
from gpurnn.cuda import reports
from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.specs import KernelSpec
from gpurnn.dense import Dense, GroupSizes, RowSizes
from gpurnn.planning import Group, Plan, dtype_name, generation_plan, generation_words
from gpurnn.sampling import TokenSampler, beyond_all_bounds, nothing_to_draw
from gpurnn.tile import VECTOR

__all__ = ["generate", "run"]

Ids = NDArray[Any]

NOT_A_NUMBER, INFINITE = -1, -2  # of gpurnn.kernels.sampling


class _Model(NamedTuple):
    """A language model's parameters, all in one place and of one dtype."""

    table: Array  # (q, h): X W_xh + b_h of the first layer, for each id
    W_xh: list[Array]  # of the further layers
    W_hh: list[Array]
    b_h: list[Array]  # of the further layers
    W_hq: Array
    b_q: Array


def generate(
    engine: Engine,
    kernel: str | Group | None,
    params: Mapping[str, Array],
    layers: int,
    activation: AnyActivation,
    prefixes: Sequence[Ids],
    n: int,
    sampler: TokenSampler,
    first: int,
) -> Ids:
    """Continue each of the prefixes by n tokens.

    Args:
        engine: where the parameters lie.
        kernel: see ``planning.generation_plan``.
        params: as ``LanguageModel.params`` names them, C-contiguous, float32 or float64.
        layers: recurrent layers. activation: theirs.
        prefixes: (N,) ids each, N ≥ 1, of the vocabulary, in the host's memory.
        n: tokens, at least 1.
        sampler: its settings and seed count. first: the number of the first token drawn.

    Returns:
        (rows, n) ids in the host's memory: this waits for the GPU.

    Raises:
        ValueError: the kernel named cannot hold the model, or the logits of a token had no
            distribution, as ``sampler.probabilities`` says.
        RuntimeError: a block of a group waited for another in vain.
    """
    h, q = params["W_hq"].shape
    plan = generation_plan(
        rows=len(prefixes),
        h=h,
        q=q,
        layers=layers,
        dtype=dtype_name(params["W_hq"].dtype),
        device=engine.limits,
        kernel=kernel,
    )
    found, codes = run(engine, plan, params, layers, activation, prefixes, n, sampler, first)
    for code in codes[codes != 0][:1]:
        if code in (NOT_A_NUMBER, INFINITE):
            raise beyond_all_bounds(np.nan if code == NOT_A_NUMBER else np.inf)
        raise nothing_to_draw(q, sampler.never)
    return found.astype(np.int64)


def run(
    engine: Engine,
    plan: Plan,
    params: Mapping[str, Array],
    layers: int,
    activation: AnyActivation,
    prefixes: Sequence[Ids],
    n: int,
    sampler: TokenSampler,
    first: int,
) -> tuple[Ids, Ids]:
    """Do as ``generate`` by a plan; return the ids, int32, and what became of each row.

    That is 0, or the code of ``gpurnn.kernels.sampling`` for the logits by which it ended: then its
    ids are −1 from there on.
    """
    q, dtype = params["W_hq"].shape[1], params["W_hq"].dtype
    rows = len(prefixes)
    if rows == 0 or n == 0:
        return np.empty((rows, n), np.int32), np.zeros(rows, np.int32)
    with engine.here():
        model = _model(engine, params, layers, sampler.never)
        longest = max(map(len, prefixes))
        ids = np.zeros((rows, longest), np.int32)
        for row, prefix in zip(ids, prefixes, strict=True):
            row[: len(prefix)] = prefix
        lengths = np.array([len(prefix) for prefix in prefixes], np.int32)
        # Smaller temperatures than the type has are its smallest: as greedy, for logits that
        # differ.
        kind = np.finfo(dtype)
        temperature = min(max(sampler.temperature, float(kind.tiny)), float(kind.max))
        top_p = max(sampler.top_p or 1.0, float(kind.tiny))  # 0 would cut the likeliest too
        settings = np.array([1 / temperature, top_p], dtype)
        top_k = 1 if sampler.temperature == 0 else min(sampler.top_k or q, q)
        put = engine.xp.array
        given = (put(ids.reshape(-1)), put(lengths), model.table.reshape(-1))
        integers = (longest, n, first, top_k, *philox.key(sampler.seed))
        out = engine.xp.empty(rows * n, np.int32)
        status = engine.xp.empty(rows, np.int32)
        launch = _launch_rows if isinstance(plan.tile, RowSizes) else _launch_groups
        launch(engine, plan, activation, model, given, put(settings), out, status, integers)
        found, codes = _host(out).reshape(rows, n), _host(status)
        engine.check_reports()
    return found, codes


def _model(engine: Engine, params: Mapping[str, Array], layers: int, never: list[int]) -> _Model:
    xp = engine.xp
    params = {name: xp.ascontiguousarray(p) for name, p in params.items()}
    W_hq = params["W_hq"]
    (h, q), dtype = W_hq.shape, W_hq.dtype
    zeros = xp.zeros(h, dtype)
    table = xp.empty((q, h), dtype)
    if "E" in params:
        engine.product(params["E"], params["W_xh"], table)
    else:
        table[...] = params["W_xh"]
    if "b_h" in params:
        table += params["b_h"]
    b_q = params["b_q"].copy() if "b_q" in params else xp.zeros(q, dtype)
    if never:
        b_q[xp.array(np.array(never))] = -np.inf
    upper = range(1, layers)
    return _Model(
        table,
        [params[f"W_xh.{layer}"] for layer in upper],
        [params["W_hh"], *(params[f"W_hh.{layer}"] for layer in upper)],
        [params.get(f"b_h.{layer}", zeros) for layer in upper],
        W_hq,
        b_q,
    )


def _launch_rows(
    engine: Engine,
    plan: Plan,
    activation: AnyActivation,
    model: _Model,
    given: tuple[Array, ...],
    settings: Array,
    out: Array,
    status: Array,
    integers: tuple[int, ...],
) -> None:
    sizes, xp = plan.tile, engine.xp
    assert isinstance(sizes, RowSizes)
    matrices = [model.W_hh[0]]
    for W_xh, W_hh in zip(model.W_xh, model.W_hh[1:], strict=True):
        matrices += [W_xh, W_hh]
    matrices.append(model.W_hq)
    dtype, h = model.W_hq.dtype, sizes.h
    weights = xp.empty(sum(matrix.numbers for matrix in sizes.matrices), dtype)
    for W, matrix, at in zip(matrices, sizes.matrices, sizes.packed_at, strict=True):
        _pack(xp, W, matrix, weights[at : at + matrix.numbers])
    biases = xp.empty(len(model.b_h) * h + sizes.q, dtype)
    for layer, b_h in enumerate(model.b_h):
        biases[layer * h : (layer + 1) * h] = b_h
    biases[len(model.b_h) * h :] = model.b_q
    scratch = xp.empty(1 if sizes.logits_on_chip else 2 * sizes.q * len(status), dtype)
    spec = _spec("generate_rows", sizes, activation, dtype, None)
    arrays = (*given, weights, biases, settings, scratch, out, status)
    engine.launch(spec, plan.grid, plan.block, arrays, [integers], plan.shared)


def _launch_groups(
    engine: Engine,
    plan: Plan,
    activation: AnyActivation,
    model: _Model,
    given: tuple[Array, ...],
    settings: Array,
    out: Array,
    status: Array,
    integers: tuple[int, ...],
) -> None:
    """Launch the groups, several times where they do not generate all rows at once."""
    sizes, xp = plan.tile, engine.xp
    assert isinstance(sizes, GroupSizes)
    share, output, rows = sizes.share, sizes.output, len(status)
    engine.check_reports()
    parts = share.blocks if sizes.split else 1
    packed = xp.empty((parts, output.numbers), model.W_hq.dtype)
    for i in range(parts):
        begin = i * output.width
        _pack(xp, model.W_hq[:, begin : begin + output.width], output, packed[i])
    groups = plan.grid[0] // share.blocks
    starts = range(0, rows, groups)
    words = engine.scratch((len(starts), 2, groups * generation_words(plan)))
    kept = 2 * (share.h + sizes.q) * groups if plan.exchange == "counter" else 1
    exchanged = xp.empty(kept, packed.dtype)
    report = engine.report(plan.grid[0])
    spec = _spec("generate_group", sizes, activation, packed.dtype, plan.exchange)
    for i, row_0 in enumerate(starts):
        arrays = (*given, model.W_hh[0], packed, model.b_q, settings, words[i, 0], words[i, 1])
        engine.launch(
            spec,
            plan.grid,
            plan.block,
            (*arrays, exchanged, out, status, report),
            [(*integers, rows, row_0, reports.PATIENCE)],
            plan.shared,
            cluster=plan.cluster,
            cooperative=plan.cooperative,
        )


def _pack(xp: Any, W: Array, sizes: Dense, out: Array) -> None:
    """Write W as ``gpurnn.dense.Dense`` packs it; ``out`` is flat."""
    S, Q, C, G, P = sizes.slices, sizes.quads, sizes.columns, sizes.groups, sizes.passes
    whole = xp.zeros((S * sizes.depth, P * G * C), W.dtype)
    whole[: W.shape[0], : W.shape[1]] = W
    by_thread = whole.reshape(S, Q, VECTOR, P, G, C).transpose(3, 1, 5, 4, 0, 2)
    out.reshape(by_thread.shape)[...] = by_thread


def _spec(
    kind: Any, sizes: Any, activation: AnyActivation, dtype: Any, exchange: str | None
) -> KernelSpec:
    key = activation if isinstance(activation, Activation) else activation.name
    return KernelSpec(kind, sizes, key, dtype_name(dtype), False, exchange)


def _host(a: Array) -> Ids:
    """Return an array in the host's memory, once the GPU has written it."""
    found: Ids = a.get() if hasattr(a, "get") else a
    return found
