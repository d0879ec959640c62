"""The only checks: arguments → C-contiguous arrays of one dtype, or an error that says why not.

Every error names the argument, what came and what was expected. Nothing has been computed or
written when one is raised. TypeError: not an array, an array of another kind, dtype or device.
ValueError: a rank, size, id or value that does not fit.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpurnn.activation import Activation, AnyActivation
from gpurnn.activations import ACTIVATIONS, FAST_ACTIVATIONS
from gpurnn.planning import DTYPES, MOST_ROWS, dtype_name

__all__ = [
    "HOST",
    "LossArguments",
    "NonFiniteError",
    "Place",
    "RNNArguments",
    "activation",
    "activation_name",
    "activation_or_name",
    "array",
    "at_least",
    "axes",
    "choice",
    "cross_entropy",
    "dropout",
    "dtype",
    "embedding",
    "embedding_backward",
    "generator",
    "hidden_layer",
    "integers",
    "kernels_place",
    "like",
    "linear",
    "linear_backward",
    "negative_log_likelihood",
    "number",
    "outs",
    "positive",
    "refuse_non_finite",
    "rnn_backward",
    "rnn_forward",
    "supported",
    "text_ids",
    "token_ids",
]

Floats = NDArray[Any]
Ids = NDArray[Any]

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class Place:
    """Where arrays have to lie, ``xp`` being the library that makes them, and of which dtypes."""

    xp: Any
    dtypes: tuple[str, ...]

    @property
    def expected(self) -> str:
        """The dtypes in words."""
        return f"{', '.join(self.dtypes[:-1])} or {self.dtypes[-1]}"


HOST = Place(np, ("float32", "float64"))
"""NumPy and its own two dtypes: the reference."""


def kernels_place(xp: Any) -> Place:
    """Return the place whose arrays kernels take: CuPy's, or NumPy's under the emulator."""
    return Place(xp, DTYPES)


class NonFiniteError(ValueError):
    """An array holds a NaN or an infinity; the message names it and where."""


class RNNArguments(NamedTuple):
    """What ``rnn_forward`` may rely on: contiguous arrays of one dtype, sizes that fit."""

    X: Floats | Ids
    h_0: Floats | None
    W_xh: Floats
    W_hh: Floats
    b_h: Floats | None
    activation: AnyActivation


def rnn_forward(
    X: object,
    h_0: object,
    W_xh: object,
    W_hh: object,
    b_h: object,
    phi: object,
    place: Place = HOST,
    *,
    check_ids: bool = True,
) -> RNNArguments:
    """Check the arguments of ``functional.rnn_forward``."""
    activation_ = activation(phi)
    W_hh_ = _floats("W_hh", W_hh, "(h, h)", 2, place=place)
    h = W_hh_.shape[0]
    _shape("W_hh", W_hh_, "(h, h)", (h, h))
    supported(activation_, W_hh_, "W_hh", place)
    W_xh_ = _floats("W_xh", W_xh, "(d, h)", 2, W_hh_.dtype, "W_hh", place)
    d = W_xh_.shape[0]
    _shape("W_xh", W_xh_, "(d, h)", (d, h))
    b_h_ = _optional_bias("b_h", b_h, "(h,)", h, W_hh_.dtype, "W_hh", place)
    X_ = array("X", X, place)
    if X_.dtype.kind in "iu":
        _rank("X", X_, "(T, n) ids or (T, n, d) floats", 2)
        X_ = token_ids("X", X_, d, "W_xh", place=place, check=check_ids)
    else:
        X_ = _floats("X", X_, "(T, n, d) floats or (T, n) ids", 3, W_hh_.dtype, "W_hh", place)
        _shape("X", X_, "(T, n, d)", (*X_.shape[:2], d))
    n = X_.shape[1]
    h_0_ = None
    if h_0 is not None:
        h_0_ = _floats("h_0", h_0, "(n, h)", 2, W_hh_.dtype, "W_hh", place)
        _shape("h_0", h_0_, "(n, h)", (n, h))
    return RNNArguments(X_, h_0_, W_xh_, W_hh_, b_h_, activation_)


def rnn_backward(
    dH: object, shape: tuple[int, ...], dtype: np.dtype[Any], xi: object, place: Place = HOST
) -> tuple[Floats, Floats | None]:
    """Check the arguments of ``functional.rnn_backward``: the forward pass's H was like this."""
    dH_ = _floats("dH", dH, "H's shape", None, dtype, "H", place)
    _shape("dH", dH_, "H's shape", shape)
    if xi is None:
        return dH_, None
    xi_ = _floats("xi", xi, "(T,)", 1, dtype, "H", place)
    _shape("xi", xi_, "(T,)", shape[:1])
    return dH_, xi_


def linear(
    H: object, W_hq: object, b_q: object, place: Place = HOST
) -> tuple[Floats, Floats, Floats | None]:
    """Check the arguments of ``functional.linear``."""
    return _dense(H, W_hq, b_q, ("H", "W_hq", "b_q"), ("h", "q"), place)


def hidden_layer(
    X: object, W_xh: object, b_h: object, phi: object, place: Place = HOST
) -> tuple[Floats, Floats, Floats | None, AnyActivation]:
    """Check the arguments of ``functional.hidden_layer``."""
    activation_ = activation(phi)
    X_, W_xh_, b_h_ = _dense(X, W_xh, b_h, ("X", "W_xh", "b_h"), ("d", "h"), place)
    supported(activation_, W_xh_, "W_xh", place)
    return X_, W_xh_, b_h_, activation_


def linear_backward(
    dO: object, H: object, W_hq: object, place: Place = HOST
) -> tuple[Floats, Floats, Floats]:
    """Check the arguments of ``functional.linear_backward``."""
    H_, W_hq_, _ = linear(H, W_hq, None, place)
    dO_ = _floats("dO", dO, "(…, q)", None, W_hq_.dtype, "W_hq", place)
    _shape("dO", dO_, "(…, q)", (*H_.shape[:-1], W_hq_.shape[1]))
    return dO_, H_, W_hq_


def embedding(
    ids: object, E: object, place: Place = HOST, *, check_ids: bool = True
) -> tuple[Ids, Floats]:
    """Check the arguments of ``functional.embedding``."""
    E_ = _floats("E", E, "(|V|, d)", 2, place=place)
    return token_ids("ids", ids, E_.shape[0], "E", place=place, check=check_ids), E_


def embedding_backward(
    dX: object, ids: object, num_rows: object, place: Place = HOST, *, check_ids: bool = True
) -> tuple[Floats, Ids, int]:
    """Check the arguments of ``functional.embedding_backward``."""
    rows = positive("num_rows", num_rows)
    ids_ = token_ids("ids", ids, rows, "dE", place=place, check=check_ids)
    for name, size in (("num_rows", rows), ("ids.size", ids_.size)):
        if place is not HOST and size >= MOST_ROWS:
            raise ValueError(f"{name} is {size:,}: expected less than 2³¹, as kernels count rows")
    dX_ = _floats("dX", dX, "(…, d)", ids_.ndim + 1, place=place)
    _shape("dX", dX_, "(…, d)", (*ids_.shape, dX_.shape[-1]))
    return dX_, ids_, rows


class LossArguments(NamedTuple):
    """What a loss may rely on: rows of O (N, q), and as many targets (N,)."""

    O: Floats
    targets: Ids
    ignored: int | None
    smoothing: float = 0.0


def cross_entropy(
    O: object,
    targets: object,
    ignore_index: object = None,
    label_smoothing: object = 0.0,
    place: Place = HOST,
    *,
    check_ids: bool = True,
) -> LossArguments:
    """Check the arguments of ``functional.cross_entropy``: at least one row, all rows flat."""
    smoothing = number(
        "label_smoothing", label_smoothing, "a number in [0, 1)", lambda x: 0 <= x < 1
    )
    found = negative_log_likelihood(O, targets, ignore_index, place, check_ids=check_ids)
    if found.targets.size == 0:
        shape = array("targets", targets, place).shape
        raise ValueError(f"targets has shape {shape}: a mean needs at least one row")
    return found._replace(smoothing=smoothing)


def negative_log_likelihood(
    O: object,
    targets: object,
    ignore_index: object = None,
    place: Place = HOST,
    *,
    check_ids: bool = True,
) -> LossArguments:
    """Check the arguments of ``functional.negative_log_likelihood``; the rows come back flat."""
    ignored = None
    if ignore_index is not None:
        ignored = at_least("ignore_index", ignore_index, -MOST_ROWS)
        if ignored >= MOST_ROWS:
            raise ValueError(f"ignore_index is {ignored}: expected less than 2³¹")
    O_ = _floats("O", O, "(…, q)", None, place=place)
    q = O_.shape[-1]
    targets_ = token_ids(
        "targets", targets, q, "O", "columns", place, check=check_ids, ignored=ignored
    )
    _shape("targets", targets_, "O's leading axes", O_.shape[:-1])
    if place is not HOST and max(targets_.size, q) >= MOST_ROWS:
        raise ValueError(f"O has shape {O_.shape}: expected less than 2³¹ rows and columns")
    return LossArguments(O_.reshape(targets_.size, q), targets_.reshape(-1), ignored)


def dropout(
    H: object, p: object, seed: object, update: object, place: Place = HOST
) -> tuple[Floats, float, int, int | Ids]:
    """Check the arguments of ``functional.dropout``; an update in an array comes back flat."""
    p_ = number("p", p, "a probability in [0, 1)", lambda x: 0 <= x < 1)
    seed_ = at_least("seed", seed, 0)
    H_ = _floats("H", H, "(…)", None, place=place)
    if not isinstance(update, place.xp.ndarray):
        return H_, p_, seed_, at_least("update", update, 0)
    update_ = array("update", update, place)
    if update_.dtype != np.int64:
        raise TypeError(f"update has dtype {update_.dtype}: expected int64, or an integer")
    if update_.size != 1:
        raise ValueError(f"update has shape {update_.shape}: expected one number, (1,)")
    return H_, p_, seed_, update_.reshape(()) if place is HOST else update_.reshape(-1)


def activation(value: object) -> AnyActivation:
    """Return the pair named ``value``, or ``value`` if it is an ``Activation``."""
    if isinstance(value, Activation):
        return value
    named = {**ACTIVATIONS, **FAST_ACTIVATIONS}
    return named[choice("activation", value, named, " or a gpurnn.Activation")]


def activation_or_name(value: object) -> str | Activation:
    """Return ``value`` if it stands for an activation: one's name, or an ``Activation``."""
    found = activation(value)
    return found if isinstance(found, Activation) else found.name


def activation_name(value: object) -> str:
    """Return ``value`` if it is the name of an activation."""
    return choice("activation", value, (*ACTIVATIONS, *FAST_ACTIVATIONS))


def choice(name: str, value: object, choices: Collection[str], else_: str = "") -> str:
    """Return ``value`` if it is one of the strings ``choices``; ``else_`` ends what is expected."""
    wanted = f"expected one of {', '.join(choices)}{else_}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}: {wanted}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: {wanted}")
    return value


def positive(name: str, value: object) -> int:
    """Return ``value`` as an int if it is an integer of at least 1."""
    return at_least(name, value, 1)


def at_least(name: str, value: object, least: int) -> int:
    """Return ``value`` as an int if it is an integer, ``least`` or more."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}: expected at least {least}")
    return int(value)


def number(
    name: str, value: object, expected: str, accepts: Callable[[float], bool] = math.isfinite
) -> float:
    """Return ``value`` as a float if it is a real number that is accepted; ``expected`` says so."""
    wrong = f"{name} is {value!r}: expected {expected}"
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError(wrong)
    if not accepts(float(value)):
        raise ValueError(wrong)
    return float(value)


def generator(name: str, seed: int | np.random.Generator | None) -> np.random.Generator:
    """Return a generator for a seed (None: a new one each time), or the one given."""
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(None if seed is None else at_least(name, seed, 0))


def dtype(name: str, value: object) -> np.dtype[Any]:
    """Return float32 or float64."""
    try:
        found = np.dtype(value)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected float32 or float64") from None
    if value is None or found not in FLOAT_DTYPES:  # NumPy reads None as float64
        raise TypeError(
            f"{name} is {value if value is None else found}: expected float32 or float64"
        )
    return np.float64().dtype if found == np.float64 else np.float32().dtype


def axes(
    name: str,
    a: object,
    spelled: str,
    expected: tuple[int | None, ...],
    place: Place = HOST,
) -> None:
    """Raise ValueError unless ``a`` has the expected shape; None stands for any size."""
    shape = array(name, a, place).shape
    if len(shape) != len(expected) or any(
        e not in (None, s) for e, s in zip(expected, shape, strict=True)
    ):
        sizes = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {shape}: expected {spelled} = ({sizes})")


def like(name: str, a: object, other_name: str, other: Floats, place: Place = HOST) -> Floats:
    """Return ``a`` as an array of ``other``'s shape and dtype."""
    a_ = _floats(name, a, f"{other_name}'s shape", None, other.dtype, other_name, place)
    _shape(name, a_, f"{other_name}'s shape", other.shape)
    return a_


def outs(
    out: object,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtype: np.dtype[Any],
    place: Place = HOST,
) -> tuple[Floats | None, ...]:
    """Return the arrays that results are to be written to, None where there is none.

    ``out`` is None, or has an array or None for each of ``names``; an array is C-contiguous.
    """
    if out is None:
        return (None,) * len(names)
    wanted = f"expected None or ({', '.join(names)})"
    if not isinstance(out, tuple | list):
        raise TypeError(f"out is {out!r}: {wanted}")
    if len(out) != len(names):
        raise ValueError(f"out has {len(out)} entries: {wanted}")
    found: list[Floats | None] = []
    for a, name, shape in zip(out, names, shapes, strict=True):
        if a is None:
            found.append(None)
            continue
        a_ = _floats(f"out of {name}", a, f"{name}'s shape", None, dtype, name, place)
        _shape(f"out of {name}", a_, f"{name}'s shape", shape)
        if not array(f"out of {name}", a, place).flags.c_contiguous:
            raise ValueError(f"out of {name} is not C-contiguous: what is written to has to be")
        if isinstance(a, np.ndarray) and not a.flags.writeable:
            raise ValueError(f"out of {name} is read-only: what is written to cannot be")
        found.append(a_)
    return tuple(found)


def token_ids(
    name: str,
    a: object,
    size: int,
    owner: str,
    axis: str = "rows",
    place: Place = HOST,
    check: bool = True,
    ignored: int | None = None,
) -> Ids:
    """Return ids in [0, size) as a C-contiguous array: of the platform's index type, or int32.

    Kernels take int32. For ids on a GPU this waits for it, to know their range; ``check=False``
    trusts them there. Those that are ``ignored`` may lie anywhere.
    """
    ids = integers(name, a, place)
    if ids.size and (check or place.xp is np):
        looked_at = ids if ignored is None else _others(ids, ignored)
        low, high = (int(looked_at.min()), int(looked_at.max())) if looked_at.size else (0, 0)
        if looked_at.size and (low < 0 or high >= size):
            bad = low if low < 0 else high
            where = tuple(int(i) for i in place.xp.argwhere(ids == bad)[0])
            raise ValueError(
                f"{name} holds the id {bad} at index {where}: {owner} has {size} {axis}, "
                f"so ids must lie in [0, {size})"
            )
    index = np.intp if place is HOST else np.int32
    indices: Ids = place.xp.asarray(ids, dtype=index, order="C")
    return indices  # ascontiguousarray would lift 0 axes to 1


def _others(ids: Ids, ignored: int) -> Ids:
    limits = np.iinfo(ids.dtype)
    return ids[ids != ignored] if limits.min <= ignored <= limits.max else ids


def text_ids(name: str, a: object) -> Ids:
    """Return ``a``, itself and no copy, if it is a one-dimensional array of integers."""
    ids = integers(name, a)
    _rank(name, ids, "(N,) ids", 1)
    return ids


def refuse_non_finite(arguments: Mapping[str, object]) -> None:
    """Raise NonFiniteError naming the first of the float arrays that holds a NaN or infinity."""
    for name, a in arguments.items():
        if isinstance(a, np.ndarray) and a.dtype.kind == "f":
            finite = np.isfinite(a)
            if not finite.all():
                where = tuple(int(i) for i in np.argwhere(~finite)[0])
                count = int(a.size - np.count_nonzero(finite))
                raise NonFiniteError(
                    f"{name} holds {a[where]} at index {where} ({count} of its {a.size} values "
                    "are not finite): expected finite values"
                )


def _dense(
    H: object,
    W: object,
    b: object,
    names: tuple[str, str, str],
    sizes: tuple[str, str],
    place: Place,
) -> tuple[Floats, Floats, Floats | None]:
    W_ = _floats(names[1], W, f"({', '.join(sizes)})", 2, place=place)
    rows = f"(…, {sizes[0]})"
    H_ = _floats(names[0], H, rows, None, W_.dtype, names[1], place)
    _shape(names[0], H_, rows, (*H_.shape[:-1], W_.shape[0]))
    if place is not HOST and math.prod(H_.shape[:-1]) >= MOST_ROWS:
        raise ValueError(
            f"{names[0]} has shape {H_.shape}: expected less than 2³¹ rows, those of one "
            "matrix product"
        )
    b_ = _optional_bias(names[2], b, f"({sizes[1]},)", W_.shape[1], W_.dtype, names[1], place)
    return H_, W_, b_


def supported(phi: AnyActivation, W: Floats, name: str, place: Place) -> None:
    """Refuse a fast activation in float64: kernels have none."""
    phi_name = "" if isinstance(phi, Activation) else phi.name
    if place is not HOST and phi_name in FAST_ACTIVATIONS and W.dtype == np.float64:
        exact = phi_name.removeprefix("fast_")
        raise ValueError(
            f"activation is {phi_name!r} and {name} has dtype float64: kernels have it for "
            f"float32, float16 and bfloat16; expected one of these, or {exact!r}"
        )


def _optional_bias(
    name: str, b: object, spelled: str, size: int, dtype: np.dtype[Any], owner: str, place: Place
) -> Floats | None:
    if b is None:
        return None
    b_ = _floats(name, b, spelled, 1, dtype, owner, place)
    _shape(name, b_, spelled, (size,))
    return b_


def array(name: str, a: object, place: Place = HOST) -> NDArray[Any]:
    """Return ``a`` if it is an array that lies in ``place``, and has no mask."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: pass .filled(…)")
    if isinstance(a, place.xp.ndarray):
        found: NDArray[Any] = place.xp.asarray(a)
        return found
    kind = f"{type(a).__module__}.{type(a).__qualname__}"
    if hasattr(a, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} is a {kind} on a GPU: expected a numpy.ndarray here; copy it to the host first"
        )
    raise TypeError(f"{name} is a {kind}: expected a numpy.ndarray")


def integers(name: str, a: object, place: Place = HOST) -> Ids:
    """Return ``a`` if it is an array of integers that lies in ``place``."""
    ids = array(name, a, place)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {ids.dtype}: expected integer token ids")
    return ids


def _floats(
    name: str,
    a: object,
    spelled: str,
    ndim: int | None,
    dtype: np.dtype[Any] | None = None,
    owner: str = "",
    place: Place = HOST,
) -> Floats:
    """Return ``a`` as a C-contiguous array of ``dtype`` with ``ndim`` axes (None: at least one)."""
    found = array(name, a, place)
    if dtype_name(found.dtype) not in place.dtypes or not found.dtype.isnative:
        raise TypeError(f"{name} has dtype {found.dtype}: expected {place.expected}")
    if dtype is not None and found.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {found.dtype} but {owner} has {dtype}: expected one dtype for all"
        )
    _rank(name, found, spelled, ndim)
    contiguous: Floats = place.xp.ascontiguousarray(found)
    return contiguous


def _rank(name: str, a: NDArray[Any], spelled: str, ndim: int | None) -> None:
    if a.ndim != ndim if ndim is not None else a.ndim < 1:
        wanted = "at least 1" if ndim is None else str(ndim)
        raise ValueError(
            f"{name} has shape {a.shape}, {a.ndim} axes: expected {spelled}, {wanted} axes"
        )


def _shape(name: str, a: NDArray[Any], spelled: str, expected: tuple[int, ...]) -> None:
    if a.shape != expected:
        raise ValueError(f"{name} has shape {a.shape}: expected {spelled} = {expected}")
