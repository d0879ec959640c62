"""Twins of inline PTX, as a kernel library would have them."""

from collections.abc import Callable
from typing import Any

__all__ = [
    "Twin",
    "bar_arrive",
    "bar_sync",
    "cluster_arrive",
    "cluster_map",
    "cluster_rank",
    "cluster_size",
    "cluster_sync",
    "cluster_wait",
    "volatile_load",
]


class Twin:
    """Stands for an intrinsic: it cannot run, its twin can."""

    def __init__(self, emulated: Callable[..., Any]):
        self.emulated = emulated


cluster_rank = Twin(lambda cuda: cuda.emu.cluster_rank())
cluster_size = Twin(lambda cuda: cuda.emu.cluster_size())
cluster_sync = Twin(lambda cuda: cuda.emu.cluster_sync())
cluster_arrive = Twin(lambda cuda: cuda.emu.cluster_arrive())
cluster_wait = Twin(lambda cuda: cuda.emu.cluster_wait())
cluster_map = Twin(lambda cuda, array, rank: cuda.emu.cluster_map(array, rank))
volatile_load = Twin(lambda cuda, array, index: cuda.emu.strong_load(array, index))
bar_sync = Twin(lambda cuda, number, count: cuda.emu.bar_sync(number, count))
bar_arrive = Twin(lambda cuda, number, count: cuda.emu.bar_arrive(number, count))
