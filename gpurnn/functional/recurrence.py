"""The recurrence over a whole sequence, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, segments, validate
from gpurnn.activation import Activation, AnyActivation
from gpurnn.cuda import operations
from gpurnn.cuda.engines import Engine
from gpurnn.functional.placing import beside, placed, put, quiet, there
from gpurnn.planning import KERNELS, PRECISIONS, Group, Plan

__all__ = ["RNNResiduals", "rnn_backward", "rnn_forward"]

Floats = NDArray[Any]
Outs = tuple[Floats | None, Floats | None, Floats | None]
Ids = NDArray[Any]


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
    engine, (X, h_0, W_xh, W_hh, b_h), place = placed(
        {"X": X, "h_0": h_0, "W_xh": W_xh, "W_hh": W_hh, "b_h": b_h}
    )
    with there(engine):
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
    with quiet():
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
    dH: Floats,
    residuals: RNNResiduals,
    *,
    xi: Floats | None = None,
    out: Outs | None = None,
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
        out: arrays that dW_xh, dW_hh and db_h are written to, None for a new one.

    Returns:
        dX (None for ids), dh_0 (n, h), dW_xh, dW_hh, db_h (None without bias).

    Raises:
        TypeError, ValueError: dH or xi has another dtype or shape than H asks for, or dH holds a
            NaN.
    """
    r = residuals
    (dH, xi), place = beside(r.engine, {"dH": dH, "xi": xi})
    with there(r.engine):
        shape = (*r.X.shape[:2], len(r.W_hh))
        dH_, xi_ = validate.rnn_backward(dH, shape, r.W_hh.dtype, xi, place)
        shapes = (r.W_xh.shape, r.W_hh.shape, r.W_hh.shape[:1])
        outs = validate.outs(out, ("dW_xh", "dW_hh", "db_h"), shapes, r.W_hh.dtype, place)
    if r.engine is not None and r.plan is not None:
        dX, dh_0, dW_xh, dW_hh, db_h = _rnn_backward_by_kernels(r.engine, r.plan, r, dH_, xi_, outs)
        return dX, dh_0, dW_xh, dW_hh, db_h if r.b_h is not None else None
    with quiet():
        dX, dh_0, dW_xh, dW_hh, db_h = _rnn_backward_by_reference(r, dH_, xi_)
    if not (np.isfinite(db_h).all() and np.isfinite(dh_0).all()):
        validate.refuse_non_finite({"dH": dH_, "xi": xi_})
    dW_xh, dW_hh, db_h = map(put, (dW_xh, dW_hh, db_h), outs)
    return dX, dh_0, dW_xh, dW_hh, db_h if r.b_h is not None else None


def _rnn_backward_by_kernels(
    engine: Engine,
    plan: Plan,
    r: RNNResiduals,
    dH: Floats,
    xi: Floats | None,
    outs: tuple[Floats | None, ...],
) -> segments.Gradients:
    if r.checkpoint_every is None:
        return operations.rnn_backward(
            engine, plan, dH, r.X, r.states, r.Z, r.W_xh, r.W_hh, r.activation, xi, outs
        )
    dX, dh_0, *found = operations.rnn_backward_by_segments(
        engine, plan, r.checkpoint_every, dH, r.X, r.states, r.W_xh, r.W_hh, r.b_h, r.activation, xi
    )
    dW_xh, dW_hh, db_h = map(put, found, outs)
    return dX, dh_0, dW_xh, dW_hh, db_h


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
