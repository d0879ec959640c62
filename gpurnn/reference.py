"""The definition of right: every operation in plain NumPy, float32 or float64.

Written to be read beside section 9.4 of *Dive into Deep Learning*; equation numbers are its own.
Arguments have passed ``gpurnn.validate``: C-contiguous arrays of one dtype, ids in range. Sums over
time are one matrix product each. The recurrence itself goes step by step, the input's product
included, so that a sequence gives the same bits whether it comes whole, in chunks or step by step.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import philox
from gpurnn.activation import AnyActivation

__all__ = [
    "cross_entropy",
    "dropout",
    "embedding_backward",
    "hidden_layer",
    "hidden_layer_backward",
    "linear",
    "linear_backward",
    "negative_log_likelihood",
    "rnn_backward",
    "rnn_forward",
    "rows_of",
]

Floats = NDArray[Any]
Ids = NDArray[Any]


def rnn_forward(
    X: Floats | Ids,
    h_0: Floats | None,
    W_xh: Floats,
    W_hh: Floats,
    b_h: Floats | None,
    activation: AnyActivation,
) -> tuple[Floats, Floats | None]:
    """H_t = φ(X_t W_xh + b_h + H_{t-1} W_hh) for t = 0…T−1 (9.4.5).

    X is (T, n, d) or ids (T, n). Returns the states *with the initial one before them*,
    (T + 1, n, h): the backward pass wants them as one array. Then what φ was applied to, (T, n, h),
    if its derivative asks for that.
    """
    (T, n), h = X.shape[:2], W_hh.shape[0]
    states = np.empty((T + 1, n, h), W_hh.dtype)
    states[0] = 0 if h_0 is None else h_0
    by_id = X.ndim == 2
    if by_id:  # a one-hot row times W_xh is a row of W_xh
        rows = W_xh if b_h is None else W_xh + b_h
        np.take(rows, X, axis=0, out=states[1:], mode="clip")  # in range: "clip" saves a buffer
    recurrent = np.empty((n, h), W_hh.dtype)
    Z = None if activation.of_output else np.empty((T, n, h), W_hh.dtype)
    for t in range(T):
        H_t = states[t + 1]
        if not by_id:
            np.matmul(X[t], W_xh, out=H_t)
            if b_h is not None:
                H_t += b_h
        np.matmul(states[t], W_hh, out=recurrent)
        H_t += recurrent
        if Z is not None:
            Z[t] = H_t
        activation.apply(H_t)
    return states, Z


def rnn_backward(
    dH: Floats,
    X: Floats | Ids,
    states: Floats,
    Z: Floats | None,
    W_xh: Floats,
    W_hh: Floats,
    activation: AnyActivation,
    xi: Floats | None,
) -> tuple[Floats | None, Floats, Floats, Floats, Floats]:
    """Return dX, dh_0, dW_xh, dW_hh, db_h, given dH = ∂L/∂H with every H_t taken as free.

    ``states`` and ``Z`` are what ``rnn_forward`` returned.
    ``xi`` (T,) scales what flows from step t back to the state before it: 0 cuts there, None never
    does (9.7.1.3: ones give the full gradient, Bernoulli(π)/π an unbiased randomized truncation).
    dX is None for ids.
    """
    H = states[1:]
    T, n, h = H.shape
    W_hh_T = np.ascontiguousarray(W_hh.T)  # read T times
    dZ = np.empty_like(H)
    activation.derivative(H if Z is None else Z, dZ)
    dh = np.zeros((n, h), H.dtype)  # the gradient by H_t, complete once dH[t] is added
    for t in reversed(range(T)):
        dh += dH[t]
        dZ[t] *= dh
        np.matmul(dZ[t], W_hh_T, out=dh)
        if xi is not None:
            dh *= xi[t]
    dZ_rows = dZ.reshape(T * n, h)
    dW_hh = states[:-1].reshape(T * n, h).T @ dZ_rows
    db_h = _sum_rows(dZ_rows)
    if X.ndim == 2:
        return None, dh, embedding_backward(dZ, X, W_xh.shape[0]), dW_hh, db_h
    dW_xh = X.reshape(T * n, X.shape[-1]).T @ dZ_rows
    dX = (dZ_rows @ W_xh.T).reshape(X.shape)
    return dX, dh, dW_xh, dW_hh, db_h


def embedding_backward(dX: Floats, ids: Ids, num_rows: int) -> Floats:
    """dE (num_rows, d): the rows of dX (…, d) summed by their id, always in the same order."""
    d = dX.shape[-1]
    dE = np.zeros((num_rows, d), dX.dtype)
    if ids.size == 0:
        return dE
    narrow = np.uint16 if num_rows <= 1 << 16 else np.int64  # 16 bits: a radix sort
    flat = ids.reshape(-1).astype(narrow)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    rows = np.take(dX.reshape(-1, d), order, axis=0, mode="clip")
    dE[ordered[starts]] = np.add.reduceat(rows, starts, axis=0)
    return dE


def rows_of(A: Floats) -> Floats:
    """All leading axes as one; their product is spelled out, as -1 cannot stand beside a 0."""
    return A.reshape(math.prod(A.shape[:-1]), A.shape[-1])


def _sum_rows(A: Floats) -> Floats:
    """Sum of the rows as a product with ones: faster and more accurate than adding row by row."""
    return np.ones(len(A), A.dtype) @ A


def linear(H: Floats, W_hq: Floats, b_q: Floats | None) -> Floats:
    """O = H W_hq + b_q over all leading axes of H (9.4.6), one product for each (n, h)."""
    O: Floats = np.matmul(H, W_hq)
    if b_q is not None:
        O += b_q
    return O


def linear_backward(dO: Floats, H: Floats, W_hq: Floats) -> tuple[Floats, Floats, Floats]:
    """Return dH (like H), dW_hq (h, q), db_q (q,)."""
    dO_rows = rows_of(dO)
    dH = (dO_rows @ W_hq.T).reshape(H.shape)
    dW_hq = rows_of(H).T @ dO_rows
    return dH, dW_hq, _sum_rows(dO_rows)


def hidden_layer(
    X: Floats, W_xh: Floats, b_h: Floats | None, activation: AnyActivation
) -> tuple[Floats, Floats | None]:
    """H = φ(X W_xh + b_h) (9.4.3): a hidden layer, without a state; Z as in ``rnn_forward``."""
    H = linear(X, W_xh, b_h)
    Z = None if activation.of_output else H.copy()
    activation.apply(H)
    return H, Z


def hidden_layer_backward(
    dH: Floats,
    X: Floats,
    H: Floats,
    Z: Floats | None,
    W_xh: Floats,
    activation: AnyActivation,
) -> tuple[Floats, Floats, Floats]:
    """Return dX, dW_xh, db_h."""
    dZ = np.empty_like(H)
    activation.derivative(H if Z is None else Z, dZ)
    dZ *= dH
    return linear_backward(dZ, X, W_xh)


def negative_log_likelihood(O: Floats, targets: Ids, ignored: int | None = None) -> Floats:
    """−log softmax(O)[target] for each row: O (N, q), targets (N,) give (N,), 0 where ignored."""
    counts = np.full(len(targets), True) if ignored is None else targets != ignored
    shifted = O - O.max(axis=1, keepdims=True)
    at_target = shifted[np.arange(len(targets)), np.where(counts, targets, 0)]
    np.exp(shifted, out=shifted)
    nll: Floats = np.log(shifted.sum(axis=1))
    nll -= at_target
    nll[~counts] = 0
    return nll


def cross_entropy(
    O: Floats, targets: Ids, ignored: int | None = None, smoothing: float = 0.0
) -> tuple[float, Floats]:
    """Mean of −Σ t log softmax(O) over the N rows, and its gradient (p − t)/N.

    t is (1 − ε) onehot + ε/q, ε the smoothing. Rows whose target is ignored are not counted in N;
    their gradient is 0. The largest logit of each row is subtracted first, so nothing overflows;
    the N losses are added in float64.
    """
    counts = np.full(len(targets), True) if ignored is None else targets != ignored
    N, q = int(np.count_nonzero(counts)), O.shape[1]
    rows, targets = np.arange(len(targets)), np.where(counts, targets, 0)
    eps = O.dtype.type(smoothing)
    on, off = 1 - eps, eps / O.dtype.type(q)
    P = O - O.max(axis=1, keepdims=True)
    losses = -on * P[rows, targets]
    if smoothing:
        losses -= off * P.sum(axis=1)
    np.exp(P, out=P)
    total = P.sum(axis=1, keepdims=True)
    losses += np.log(total[:, 0])
    loss = float(losses[counts].sum(dtype=np.float64)) / N if N else math.nan
    P /= total
    if smoothing:
        P -= off
    P[rows, targets] -= on
    P[~counts] = 0
    P /= max(N, 1)
    return loss, P


ELEMENTS_AT_A_TIME = 1 << 16  # of a mask: what is computed on the way stays in the cache


def dropout(H: Floats, p: float, seed: int, update: int) -> Floats:
    """H · mask / (1 − p): element e is kept where the uniform number of its word is p or more."""
    Y: Floats = H * H.dtype.type(1 / (1 - p))
    flat, least = Y.reshape(-1), philox.below(p) << 8
    for start in range(0, flat.size, ELEMENTS_AT_A_TIME):
        part = flat[start : start + ELEMENTS_AT_A_TIME]
        calls = np.arange(start // 4, (start + part.size + 3) // 4, dtype=np.uint64)
        words = philox.words(seed, calls, calls >> np.uint64(32), update, philox.DROPOUT)
        part[words.reshape(-1)[: part.size] < least] = 0
    return Y
