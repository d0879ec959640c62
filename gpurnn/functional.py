"""Public operations on arrays: check the arguments, then compute.

Layouts are time-major: X (T, n, d), H (T, n, h). Every function takes float32 or float64 arrays
(one dtype for all arguments of a call) of any memory order, returns new arrays of that dtype, and
never writes into its arguments. TypeError and ValueError name the argument, what came and what was
expected. T = 0 and n = 0 give empty results and zero gradients.

NaN and infinity are refused where they spoil a result: what comes out is looked at, and only if it
is not finite are the arguments searched, and the first that holds such a value is named. A result
that overflowed from finite arguments is returned as it is.

Where the arrays lie decides what runs: NumPy arrays go to ``gpurnn.reference``. The functions of
the layers (``rnn_forward`` to ``linear_backward``) also take arrays on a CUDA GPU, of CuPy or any
library that hands them out by DLPack or ``__cuda_array_interface__``, all on one device; they run
``gpurnn.kernels`` there, on CuPy's current stream, without waiting for the result, and return CuPy
arrays. Within ``gpurnn.emulated()`` they run the same kernels on NumPy arrays. Kernels also take
float16 and bfloat16: products of such numbers are summed as float32 (on tensor cores in the order
and by the rounding of the hardware), each array of a result is rounded once. The group kernel
multiplies dZ as it is rounded. Nothing is copied between host and device, and nothing falls back in
silence.

Nobody looks for NaN in what kernels compute, which would mean to wait; an infinite gradient makes
NaN of a whole column of dW_xh where X are ids. The same arguments give the same bits each time,
and in the recurrence a row's bits depend on no other row, though their number may decide which
kernel runs; the products before and after it, and
within it those of the kernel "gemm", are cuBLAS's, whose order of summation may depend on T and n.
An array handed over by another library must stay alive, and be used on CuPy's stream or one that
waits for it, until the GPU is done. The first call of a shape compiles and sets up; only later ones
can be captured in a CUDA graph. What a captured call computes with in between comes from CuPy's
memory pool and goes back to it: capture under an allocator that nothing else uses while the graph
lives.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, segments, validate
from gpurnn.activation import Activation, AnyActivation
from gpurnn.cuda import arrays, operations
from gpurnn.cuda.engines import Engine, GPUEngine, current_emulation
from gpurnn.planning import KERNELS, PRECISIONS, Group, Plan

__all__ = [
    "HiddenResiduals",
    "RNNResiduals",
    "cross_entropy",
    "embedding",
    "embedding_backward",
    "hidden_layer",
    "hidden_layer_backward",
    "linear",
    "linear_backward",
    "negative_log_likelihood",
    "rnn_backward",
    "rnn_forward",
]

Floats = NDArray[Any]
Ids = NDArray[Any]


def _quiet() -> np.errstate:
    """Overflow and NaN travel to the result, where they are looked for."""
    return np.errstate(all="ignore")


@dataclass(frozen=True, slots=True, eq=False)
class RNNResiduals:
    """What ``rnn_backward`` needs of the forward pass.

    It refers to H and to the arguments of ``rnn_forward`` (copied only where they were not
    C-contiguous): write to none of them before the backward pass. With ``checkpoint_every`` it
    does not refer to H, of which it holds a few steps.
    """

    X: Floats | Ids
    states: Floats  # (T + 1, n, h): h_0, then H; or of these the checkpoints
    Z: Floats | None  # (T, n, h), what φ was applied to, where φ′ is a function of that
    W_xh: Floats
    W_hh: Floats
    b_h: Floats | None
    activation: AnyActivation
    engine: Engine | None = None  # what ran the kernels, if any did
    plan: Plan | None = None
    checkpoint_every: int | None = None  # where states are those of ``segments.checkpoints``


@dataclass(frozen=True, slots=True, eq=False)
class HiddenResiduals:
    """What ``hidden_layer_backward`` needs; the same holds as for ``RNNResiduals``."""

    X: Floats
    H: Floats
    Z: Floats | None
    W_xh: Floats
    has_bias: bool
    activation: AnyActivation
    engine: Engine | None = None


def _placed(arguments: dict[str, object]) -> tuple[Engine | None, list[Any], validate.Place]:
    """Return what runs kernels on these arrays (None: NumPy), they, and where they must lie."""
    values = list(arguments.values())
    if any(map(arrays.on_gpu, values)):
        gpu, taken = arrays.taken(arguments)
        return gpu, list(taken.values()), validate.kernels_place(gpu.xp)
    engine = current_emulation()
    return engine, values, validate.kernels_place(engine.xp) if engine else validate.HOST


def _there(engine: Engine | None) -> AbstractContextManager[object]:
    """Return the context in which arrays are looked at where they lie."""
    return nullcontext() if engine is None else engine.here()


def _beside(
    engine: Engine | None, arguments: dict[str, object]
) -> tuple[list[Any], validate.Place]:
    """Return the arrays of a backward pass, and where they must lie, as in the forward pass."""
    values = list(arguments.values())
    if engine is None:
        return values, validate.HOST
    if isinstance(engine, GPUEngine):
        gpu, taken = arrays.taken(arguments)
        if gpu != engine:
            raise ValueError(
                f"{next(iter(arguments))} is on CUDA device {gpu.index} but the forward pass ran "
                f"on {engine.index}: expected all arrays on one device"
            )
        values = list(taken.values())
    return values, validate.kernels_place(engine.xp)


def rnn_forward(
    X: Floats | Ids,
    h_0: Floats | None,
    W_xh: Floats,
    W_hh: Floats,
    b_h: Floats | None,
    *,
    activation: str | Activation = "tanh",
    kernel: str | Group | None = None,
    precision: str = "ieee",
    check_ids: bool = True,
    checkpoint_every: int | None = None,
) -> tuple[Floats, RNNResiduals]:
    """Run H_t = φ(X_t W_xh + H_{t-1} W_hh + b_h) over a sequence (*Dive into Deep Learning* 9.4.5).

    Args:
        X: (T, n, d) floats, or (T, n) integer token ids in [0, d), each standing for the one-hot
            row of its id.
        h_0: (n, h) state before the first step; None is zeros.
        W_xh: (d, h). W_hh: (h, h). b_h: (h,), or None for no bias.
        activation: "tanh", "relu", "sigmoid", "softplus", "identity"; "fast_tanh", "fast_sigmoid"
            (a GPU may approximate, to a relative 2⁻¹¹; NumPy does not); or a ``gpurnn.Activation``.
        kernel: for arrays on a GPU, or under the emulator: "resident" (the whole sequence in one
            launch, W_hh in each block), "group" (the same, W_hh split over blocks; a
            ``gpurnn.Group`` says how many, and how they exchange their states), "step" (a launch a
            step), "concatenated" (a launch a step, the input's product in it; X must be floats),
            "gemm" (in each step a product by cuBLAS, up to 32 steps a launch
            as a CUDA graph); None leaves it to ``gpurnn.plan``.
        precision: "ieee"; "tf32" allows products with W_hh of float32 numbers rounded to 10 bits,
            on a GPU's tensor cores, summed as float32, in both passes ("group" and "gemm" then do
            so; where the resident kernel takes no longer, it runs, in IEEE). It concerns the
            recurrence alone: the other products are cuBLAS's, as CuPy is set up.
        check_ids: False where ids on a GPU are known to lie in [0, d): to look means to wait for
            the GPU, and cannot be captured in a CUDA graph.
        checkpoint_every: k ≥ 1 makes the residuals keep every k-th state alone, a copy, in place of
            H (and of the pre-activations, where φ′ wants them). ``rnn_backward`` then computes k
            states at a time again: T / k + k of them are held, least for k = √T, and the forward
            pass is paid for twice. They have the same bits again; but on a GPU, where X are floats
            and the kernel is not "concatenated", X W_xh is cuBLAS's, and may be added up in another
            order for k steps than for T.

    Returns:
        H (T, n, h), whose last step is the final state, and the residuals for ``rnn_backward``.

    Raises:
        TypeError: an argument is no array, or of another dtype or in another memory than the rest.
        ValueError: a shape does not fit, an id is out of range, the activation is unknown, or an
            argument holds a NaN. (Each NaN that is computed with reaches the final state, so that
            one look at h_T finds it. A row of W_xh that no id picks is not computed with. Kernels
            let NaN pass.) Or a kernel is named that there is not, that has no GPU to run on, or
            that cannot hold h, or checkpoint_every is below 1.
    """
    if kernel is not None and not isinstance(kernel, Group):
        validate.choice("kernel", kernel, KERNELS)
    validate.choice("precision", precision, PRECISIONS)
    if checkpoint_every is not None:
        checkpoint_every = validate.positive("checkpoint_every", checkpoint_every)
    engine, (X, h_0, W_xh, W_hh, b_h), place = _placed(
        {"X": X, "h_0": h_0, "W_xh": W_xh, "W_hh": W_hh, "b_h": b_h}
    )
    with _there(engine):
        arguments = validate.rnn_forward(
            X, h_0, W_xh, W_hh, b_h, activation, place, check_ids=check_ids
        )
    if engine is not None:
        return _rnn_forward_by_kernels(engine, kernel, arguments, precision, checkpoint_every)
    if kernel is not None:
        raise ValueError(
            f"kernel is {kernel!r} but X is a numpy.ndarray: kernels take arrays on a GPU, or "
            "NumPy's within gpurnn.emulated()"
        )
    if precision != "ieee":
        raise ValueError(
            f"precision is {precision!r} but X is a numpy.ndarray: expected an array on a GPU, or "
            "'ieee'"
        )
    with _quiet():
        states, Z = reference.rnn_forward(*arguments)
    if not np.isfinite(states[-1]).all():
        validate.refuse_non_finite(arguments._asdict())
    return states[1:], _residuals(arguments, states, Z, checkpoint_every)


def _rnn_forward_by_kernels(
    engine: Engine,
    kernel: str | Group | None,
    arguments: validate.RNNArguments,
    precision: str,
    checkpoint_every: int | None,
) -> tuple[Floats, RNNResiduals]:
    X, h_0, W_xh, W_hh, b_h, phi = arguments
    if kernel == "concatenated" and X.ndim == 2:
        raise ValueError("kernel is 'concatenated' but X holds ids: expected (T, n, d) floats")
    states, Z, plan = operations.rnn_forward(
        engine, kernel, X, h_0, W_xh, W_hh, b_h, phi, precision
    )
    with engine.here():
        return states[1:], _residuals(arguments, states, Z, checkpoint_every, engine, plan)


def _residuals(
    arguments: validate.RNNArguments,
    states: Floats,
    Z: Floats | None,
    checkpoint_every: int | None,
    engine: Engine | None = None,
    plan: Plan | None = None,
) -> RNNResiduals:
    if checkpoint_every is not None:
        states, Z = segments.checkpoints(states, checkpoint_every), None
    X, _, W_xh, W_hh, b_h, phi = arguments
    return RNNResiduals(X, states, Z, W_xh, W_hh, b_h, phi, engine, plan, checkpoint_every)


def rnn_backward(
    dH: Floats, residuals: RNNResiduals, *, xi: Floats | None = None
) -> tuple[Floats | None, Floats, Floats, Floats, Floats | None]:
    """Backpropagate through the sequence of ``rnn_forward``.

    Args:
        dH: (T, n, h), derivative of the loss by each H_t as the output of its step. A gradient that
            reaches the final state from elsewhere (the next chunk's dh_0) is added to dH[T − 1].
        residuals: from ``rnn_forward``.
        xi: (T,) factors on the gradient that flows from step t to the state before it. None or ones
            give the full gradient, a zero at t cuts between t − 1 and t (truncated backpropagation
            through time), independent draws of Bernoulli(π)/π the randomized truncation, whose mean
            is the full gradient (9.7.1.3).

    Returns:
        dX (None for ids), dh_0 (n, h), dW_xh, dW_hh, db_h (None without bias).

    Raises:
        TypeError, ValueError: dH or xi has another dtype or shape than H asks for, or dH holds a
            NaN.
    """
    r = residuals
    (dH, xi), place = _beside(r.engine, {"dH": dH, "xi": xi})
    with _there(r.engine):
        shape = (*r.X.shape[:2], len(r.W_hh))
        dH_, xi_ = validate.rnn_backward(dH, shape, r.W_hh.dtype, xi, place)
    if r.engine is not None and r.plan is not None:
        dX, dh_0, dW_xh, dW_hh, db_h = _rnn_backward_by_kernels(r.engine, r.plan, r, dH_, xi_)
        return dX, dh_0, dW_xh, dW_hh, db_h if r.b_h is not None else None
    with _quiet():
        dX, dh_0, dW_xh, dW_hh, db_h = _rnn_backward_by_reference(r, dH_, xi_)
    if not (np.isfinite(db_h).all() and np.isfinite(dh_0).all()):
        validate.refuse_non_finite({"dH": dH_, "xi": xi_})
    return dX, dh_0, dW_xh, dW_hh, db_h if r.b_h is not None else None


def _rnn_backward_by_kernels(
    engine: Engine, plan: Plan, r: RNNResiduals, dH: Floats, xi: Floats | None
) -> segments.Gradients:
    if r.checkpoint_every is None:
        return operations.rnn_backward(
            engine, plan, dH, r.X, r.states, r.Z, r.W_xh, r.W_hh, r.activation, xi
        )
    return operations.rnn_backward_by_segments(
        engine, plan, r.checkpoint_every, dH, r.X, r.states, r.W_xh, r.W_hh, r.b_h, r.activation, xi
    )


def _rnn_backward_by_reference(
    r: RNNResiduals, dH: Floats, xi: Floats | None
) -> segments.Gradients:
    def forward_pass(X: Floats | Ids, h_0: Floats) -> tuple[Floats, Floats | None]:
        return reference.rnn_forward(X, h_0, r.W_xh, r.W_hh, r.b_h, r.activation)

    def backward_pass(
        dH: Floats, X: Floats | Ids, states: Floats, Z: Floats | None, xi: Floats | None
    ) -> segments.Gradients:
        return reference.rnn_backward(dH, X, states, Z, r.W_xh, r.W_hh, r.activation, xi)

    if r.checkpoint_every is None:
        return backward_pass(dH, r.X, r.states, r.Z, xi)
    dX = None if r.X.ndim == 2 else np.empty_like(r.X)
    return segments.backward(
        dH, r.X, r.states, r.checkpoint_every, xi, forward_pass, backward_pass, dX
    )


def hidden_layer(
    X: Floats, W_xh: Floats, b_h: Floats | None, *, activation: str | Activation = "tanh"
) -> tuple[Floats, HiddenResiduals]:
    """H = φ(X W_xh + b_h) (9.4.3): X (…, d), W_xh (d, h), b_h (h,) or None → H (…, h), residuals.

    A hidden *layer*: unlike ``rnn_forward`` it has no hidden *state*.
    """
    engine, (X, W_xh, b_h), place = _placed({"X": X, "W_xh": W_xh, "b_h": b_h})
    with _there(engine):
        X_, W_xh_, b_h_, phi = validate.hidden_layer(X, W_xh, b_h, activation, place)
    if engine is not None:
        H, Z = operations.hidden_layer(engine, X_, W_xh_, b_h_, phi)
        return H, HiddenResiduals(X_, H, Z, W_xh_, b_h_ is not None, phi, engine)
    with _quiet():
        H, Z = reference.hidden_layer(X_, W_xh_, b_h_, phi)
    if not np.isfinite(H).all():
        validate.refuse_non_finite({"X": X_, "W_xh": W_xh_, "b_h": b_h_})
    return H, HiddenResiduals(X_, H, Z, W_xh_, b_h_ is not None, phi)


def hidden_layer_backward(
    dH: Floats, residuals: HiddenResiduals
) -> tuple[Floats, Floats, Floats | None]:
    """Return dX, dW_xh, db_h (None without bias) of ``hidden_layer``; dH has H's shape."""
    r = residuals
    (dH,), place = _beside(r.engine, {"dH": dH})
    with _there(r.engine):
        dH_ = validate.like("dH", dH, "H", r.H, place)
    if r.engine is not None:
        dX, dW_xh, db_h = operations.hidden_layer_backward(
            r.engine, dH_, r.X, r.H, r.Z, r.W_xh, r.activation
        )
        return dX, dW_xh, db_h if r.has_bias else None
    with _quiet():
        dX, dW_xh, db_h = reference.hidden_layer_backward(dH_, r.X, r.H, r.Z, r.W_xh, r.activation)
    if not np.isfinite(db_h).all():
        validate.refuse_non_finite({"dH": dH_})
    return dX, dW_xh, db_h if r.has_bias else None


def linear(H: Floats, W_hq: Floats, b_q: Floats | None = None) -> Floats:
    """O = H W_hq + b_q (9.4.6): H (…, h), W_hq (h, q), b_q (q,) or None → O (…, q).

    For a NumPy H (T, n, h) it is one product for each step, so that a step's O has the same bits
    alone; on a GPU one product for all.
    """
    engine, (H, W_hq, b_q), place = _placed({"H": H, "W_hq": W_hq, "b_q": b_q})
    with _there(engine):
        H_, W_hq_, b_q_ = validate.linear(H, W_hq, b_q, place)
    if engine is not None:
        result: Floats = operations.linear(engine, H_, W_hq_, b_q_)
        return result
    with _quiet():
        O = reference.linear(H_, W_hq_, b_q_)
    if not np.isfinite(O).all():
        validate.refuse_non_finite({"H": H_, "W_hq": W_hq_, "b_q": b_q_})
    return O


def linear_backward(dO: Floats, H: Floats, W_hq: Floats) -> tuple[Floats, Floats, Floats]:
    """Return dH (…, h), dW_hq (h, q), db_q (q,) of ``linear``; dO is (…, q)."""
    engine, (dO, H, W_hq), place = _placed({"dO": dO, "H": H, "W_hq": W_hq})
    with _there(engine):
        dO_, H_, W_hq_ = validate.linear_backward(dO, H, W_hq, place)
    if engine is not None:
        return operations.linear_backward(engine, dO_, H_, W_hq_)
    with _quiet():
        dH, dW_hq, db_q = reference.linear_backward(dO_, H_, W_hq_)
    if not all(np.isfinite(a).all() for a in (dH, dW_hq, db_q)):
        validate.refuse_non_finite({"dO": dO_, "H": H_, "W_hq": W_hq_})
    return dH, dW_hq, db_q


def embedding(ids: Ids, E: Floats) -> Floats:
    """Rows of E (|V|, d) by token id: ids (…) → (…, d).

    Raises:
        ValueError: an id is negative or at least |V|; the message says which and where.
    """
    ids_, E_ = validate.embedding(ids, E)
    X = np.take(E_, ids_, axis=0)
    if not np.isfinite(X).all():
        validate.refuse_non_finite({"E": E_})
    return X


def embedding_backward(dX: Floats, ids: Ids, num_rows: int) -> Floats:
    """Return dE (num_rows, d): the rows of dX (…, d) added up by their id, always in one order."""
    dX_, ids_, rows = validate.embedding_backward(dX, ids, num_rows)
    with _quiet():
        dE = reference.embedding_backward(dX_, ids_, rows)
    if not np.isfinite(dE).all():
        validate.refuse_non_finite({"dX": dX_})
    return dE


def cross_entropy(O: Floats, targets: Ids) -> tuple[float, Floats]:
    """Softmax and cross-entropy of all rows at once.

    Args:
        O: (…, q) logits. targets: (…) integer ids in [0, q).

    Returns:
        loss: mean over all rows of −log softmax(O)[target], natural logarithm, summed in float64.
        dO: (…, q), its gradient (softmax(O) − onehot(target)) / rows.

    Raises:
        TypeError, ValueError: as above; also where there is no row at all, or O holds a NaN.
    """
    O_, targets_ = validate.cross_entropy(O, targets)
    with _quiet():
        loss, dO = reference.cross_entropy(O_, targets_)
    if np.isnan(loss):
        validate.refuse_non_finite({"O": O})
    return loss, dO.reshape(np.shape(O))


def negative_log_likelihood(O: Floats, targets: Ids) -> Floats:
    """−log softmax(O)[target] of each row: O (…, q), targets (…) → (…), natural logarithm."""
    O_, targets_ = validate.negative_log_likelihood(O, targets)
    with _quiet():
        nll = reference.negative_log_likelihood(O_, targets_)
    if np.isnan(nll).any():
        validate.refuse_non_finite({"O": O})
    return nll.reshape(np.shape(targets))
