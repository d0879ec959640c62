"""Which kernel exactly: everything that machine code depends on, and how to make it.

The only module that imports kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from gpurnn.activation import Activation
from gpurnn.compiler import ArraySpec

__all__ = ["ARGUMENTS", "MOST_KEPT", "KernelSpec", "Kind", "build", "signature"]

MOST_KEPT = 1024
"""Kernels that stay in memory at once: someone may make an activation anew for each call."""

REAL = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
STORED = {"float32": "float32", "float64": "float64", "float16": "uint16", "bfloat16": "uint16"}

# Axes of each array argument in its order, "r" before them where it is of the type computed with;
# "i" stands for an integer, names for flat arrays of a type that the kernel's dtype does not alter:
# of token ids, of what a group kernel wants beside, of scalars that stay on the device.
BESIDE = {
    "ids": "int32",
    "words": "uint64",
    "report": "uint32",
    "counts": "int64",
    "doubles": "float64",
}
ARGUMENTS: dict[str, tuple[int | str, ...]] = {
    "resident_forward": (1, 1, 2, 1, "i", "i"),
    "resident_backward": (1, 1, 1, 2, "i", "i"),
    "group_forward": (1, 1, 2, 1, "words", "report", "i", "i", "i", "i"),
    "group_backward": (1, 1, 1, 2, "words", "report", "i", "i", "i", "i"),
    "generate_rows": ("ids", "ids", 1, 1, 1, "r1", 1, "ids", "ids", *"iiiiii"),
    "generate_group": (
        *("ids", "ids", 1, 2, 2, 1, "r1", "words", "words", 1, "ids", "ids", "report"),
        *"iiiiiiiii",
    ),
    "step_forward": (3, 3, 2, 1, "i"),
    "step_concatenated": (3, 3, 3, 2, 2, 1, "i"),
    "step_backward": (3, 3, 3, 2, "i"),
    "layer_forward": (2, 2, 2, 2, 1),
    "layer_backward": (1, 1, 1),
    "tail_forward": ("r2", 3, 3, 1, "i"),
    "tail_backward": ("r2", 3, 3, 3, "i"),
    "update_norm": (1, 1, 1, 1, "doubles", "doubles", "counts", "doubles"),
    "update_apply": (1, 1, 1, 1, *["doubles"] * 4, "counts", "doubles"),
    "take_batch": ("ids", "counts", 1, "counts", "ids", "ids", 1, "i", "i", "i"),
    "keep_state": (1, 1, "counts"),
    "stop_unless_finite": ("doubles", "counts"),
    "scatter": ("ids", 1, 1, "i", "i", "i", "i", "i"),
    "scatter_parts": ("ids", 1, "r1", "i", "i", "i", "i", "i"),
    "scatter_parts_added": ("r1", 1, "i"),
    "column_sums": (1, 1, "i", "i", "i"),
    "column_parts": (1, "r1", "i", "i", "i"),
    "cross_entropy": (2, 2, "ids", "r1", 1, "r1", "counts", "i", "i"),
    "target_count": ("ids", "counts", "i"),
    "loss_mean": ("r1", "counts", "doubles", "i"),
    "dropout": (1, 1, "r1", "counts", "i", "i", "i", "i"),
    "probe_launch": (),
    "probe_l2": ("report", "report", "i"),
    "probe_remote": ("report", "i"),
    "probe_cluster": ("report", "i"),
    "probe_cluster_stores": ("report", "i"),
    "probe_flag": ("words", "report", "i", "i"),
    "probe_counter": ("words", "report", "i", "i"),
}


Kind = Literal[
    "resident_forward",
    "resident_backward",
    "group_forward",
    "group_backward",
    "generate_rows",
    "generate_group",
    "step_forward",
    "step_concatenated",
    "step_backward",
    "layer_forward",
    "layer_backward",
    "tail_forward",
    "tail_backward",
    "update_norm",
    "update_apply",
    "take_batch",
    "keep_state",
    "stop_unless_finite",
    "scatter",
    "scatter_parts",
    "scatter_parts_added",
    "column_sums",
    "column_parts",
    "cross_entropy",
    "target_count",
    "loss_mean",
    "dropout",
    "probe_launch",
    "probe_l2",
    "probe_remote",
    "probe_cluster",
    "probe_cluster_stores",
    "probe_flag",
    "probe_counter",
]


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel, and what it is compiled for.

    ``kind`` is a key of ``ARGUMENTS``. ``sizes`` is the tile of a resident kernel, the share of a
    group kernel or of one that adds up rows, the side of a tiled one, those of a softmax, None
    where any block of up to 256 threads will do. ``scaled`` backward kernels take ξ as well.
    ``exchange`` is that of a group kernel. Forward kernels ``by_id`` take ids, and W_xh, of which
    those are rows. A probe is one kernel whatever its activation and dtype.
    """

    kind: Kind
    sizes: Any
    activation: str | Activation
    dtype: str
    scaled: bool = False
    exchange: str | None = None
    by_id: bool = False

    @property
    def threads(self) -> int:
        """Threads of its blocks, at most."""
        if isinstance(self.sizes, int):
            return self.sizes**2
        return 256 if self.sizes is None else int(self.sizes.threads)

    @property
    def lasting(self) -> bool:
        """Whether another process could know it again: not so with the user's own functions."""
        return isinstance(self.activation, str)


def signature(spec: KernelSpec) -> tuple[ArraySpec | None, ...]:
    """Return the types of the kernel's arguments."""
    arguments: list[ArraySpec | None] = []
    for axes in ARGUMENTS[spec.kind]:
        if axes == "i":
            arguments.append(None)
        elif isinstance(axes, str):
            beside = BESIDE.get(axes)
            if beside is not None:
                arguments.append(ArraySpec(beside, 1))
            else:
                arguments.append(ArraySpec(REAL[spec.dtype], int(axes[1:])))
        else:
            arguments.append(ArraySpec(STORED[spec.dtype], axes))
    if spec.scaled:  # after the other arrays, before the integers
        arguments.insert(arguments.index(None), ArraySpec(REAL[spec.dtype], 1))
    if spec.by_id:  # before all others
        arguments[:0] = [ArraySpec(BESIDE["ids"], 1), ArraySpec(STORED[spec.dtype], 1)]
    return tuple(arguments)


@lru_cache(maxsize=MOST_KEPT)
def build(spec: KernelSpec) -> Callable[..., None]:
    """Return the kernel's Python function."""
    from numba.cuda import types

    from gpurnn.kernels import (
        activations,
        batch,
        columns,
        cross_entropy,
        dropout,
        group,
        layer,
        loss_mean,
        probes,
        resident,
        step,
        tail,
        tokens,
        update,
    )
    from gpurnn.kernels.generate import generate_rows
    from gpurnn.kernels.generate_group import generate_group
    from gpurnn.kernels.storage import STORAGES

    storage = STORAGES[spec.dtype]
    real = getattr(types, REAL[spec.dtype])
    if isinstance(spec.activation, str):
        pair = activations.pair(spec.activation, real)
    else:
        phi = spec.activation
        pair = activations.user_pair(phi.f, phi.df, real, of_output=phi.of_output)
    sizes = spec.sizes
    made: Callable[..., None]
    match spec.kind:
        case "resident_forward":
            made = resident.forward(sizes, pair, storage, by_id=spec.by_id)
        case "resident_backward":
            made = resident.backward(sizes, pair, storage, scaled=spec.scaled)
        case "group_forward":
            made = group.forward(sizes, pair, storage, spec.exchange, by_id=spec.by_id)
        case "group_backward":
            made = group.backward(sizes, pair, storage, spec.exchange, scaled=spec.scaled)
        case "generate_rows":
            made = generate_rows(sizes, pair, storage)
        case "generate_group":
            made = generate_group(sizes, pair, storage, spec.exchange)
        case "step_forward":
            made = step.forward(sizes, pair, storage, by_id=spec.by_id)
        case "step_concatenated":
            made = step.concatenated(sizes, pair, storage)
        case "step_backward":
            made = step.backward(sizes, pair, storage, scaled=spec.scaled)
        case "layer_forward":
            made = layer.forward(sizes, pair, storage)
        case "layer_backward":
            made = layer.backward(pair, storage)
        case "tail_forward":
            made = tail.forward(pair, storage, by_id=spec.by_id)
        case "tail_backward":
            made = tail.backward(pair, storage, scaled=spec.scaled)
        case "update_norm":
            made = update.norm(sizes, storage)
        case "update_apply":
            made = update.apply(sizes, storage)
        case "take_batch":
            made = batch.take()
        case "keep_state":
            made = batch.keep()
        case "stop_unless_finite":
            made = batch.stop()
        case "scatter" | "scatter_parts":
            made = tokens.scatter(sizes, storage, partial=spec.kind == "scatter_parts")
        case "column_sums" | "column_parts":
            made = columns.column_sums(sizes, storage, partial=spec.kind == "column_parts")
        case "scatter_parts_added":
            made = tokens.add_parts(storage)
        case "cross_entropy":
            made = cross_entropy.cross_entropy(sizes, storage)
        case "target_count":
            made = loss_mean.target_count()
        case "loss_mean":
            made = loss_mean.loss_mean(storage)
        case "dropout":
            made = dropout.dropout(storage)
        case _:
            made = getattr(probes, spec.kind)
    return made
