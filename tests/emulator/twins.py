"""Twins of inline PTX, as a kernel library would have them."""

from collections.abc import Callable
from typing import Any

__all__ = [
    "Twin",
    "cluster_arrive",
    "cluster_map",
    "cluster_rank",
    "cluster_size",
    "cluster_sync",
    "cluster_wait",
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
