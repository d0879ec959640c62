"""The probes under the emulator: they end, race with nothing, and do what they are timed for."""

from typing import Any

import numpy as np
import pytest
from kernel_setup import Array
from numba import cuda

from gpurnn import compiler, emulator, resources
from gpurnn.cuda.specs import ARGUMENTS, KernelSpec, build, signature
from gpurnn.kernels import probes
from gpurnn.resources import ToolMissing
from gpurnn.tile import LINE

KINDS = tuple(kind for kind in ARGUMENTS if kind.startswith("probe_"))
CLUSTERED = ("probe_remote", "probe_cluster", "probe_cluster_stores")
SEEDS = (None, 1, 2)

each_seed = pytest.mark.parametrize("seed", SEEDS)


def launch(kernel: Any, grid: int, block: int, *arguments: Any, **options: Any) -> Any:
    return emulator.launch(kernel, grid, block, arguments, **options)


def none(size: int, dtype: Any = np.uint32) -> Array:
    return np.full(size, 0xFFFF, dtype)


def test_chain_through_l2() -> None:
    """The place after k steps of a chain that comes by every element is the k-th of them."""
    order = np.random.default_rng(0).permutation(64)
    order = np.roll(order, -int(np.flatnonzero(order == 0)[0]))
    chain = np.empty(64, np.uint32)
    chain[order] = np.roll(order, -1)
    for steps in (1, 2, 63, 64, 65):
        found = none(1)
        launch(probes.probe_l2, 1, 1, chain, found, steps)
        assert found[0] == order[steps % 64]


@each_seed
@pytest.mark.parametrize(("size", "threads"), [(2, 1), (2, 33), (4, 32)])
def test_chain_through_another_blocks_memory(size: int, threads: int, seed: int | None) -> None:
    found = none(2 * size)
    launch(probes.probe_remote, 2 * size, threads, found, 40, cluster=size, seed=seed)
    assert (found == 40 * probes.REMOTE_STRIDE % probes.REMOTE_LENGTH).all()
    assert np.gcd(probes.REMOTE_STRIDE, probes.REMOTE_LENGTH) == 1, "it comes by all of them"


@each_seed
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_cluster_barriers(size: int, seed: int | None) -> None:
    found = none(size)
    report = launch(probes.probe_cluster, size, 2, found, 7, cluster=size, seed=seed)
    assert (found == 7).all()
    assert report.barriers["cluster barrier"] == 7


@each_seed
def test_cluster_barriers_behind_stores(seed: int | None) -> None:
    found = none(4 * 3)
    report = launch(probes.probe_cluster_stores, 4, 3, found, 7, cluster=2, seed=seed)
    assert (found == 7).all()
    assert report.barriers["cluster barrier"] == 2 * 7, "of two clusters"


@each_seed
def test_flag_there_and_back(seed: int | None) -> None:
    words, report = np.zeros(LINE + 1, np.uint64), np.zeros(2, np.uint32)
    launch(probes.probe_flag, 2, 1, words, report, 9, 1000, seed=seed)
    assert words[0] == 17 | 9 << 32 and words[LINE] == 18 | 9 << 32
    assert not words[1:LINE].any(), "the two lie in lines of their own"
    assert not report.any()


@each_seed
@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (2, 1), (5, 33)])
def test_counter_barriers(blocks: int, threads: int, seed: int | None) -> None:
    words, report = np.zeros(1, np.uint64), np.zeros(blocks, np.uint32)
    launch(probes.probe_counter, blocks, threads, words, report, 6, 1000, seed=seed)
    assert words[0] == 6 * blocks
    assert not report.any()


def test_a_block_that_never_comes_is_given_up() -> None:
    words, report = np.zeros(LINE + 1, np.uint64), np.zeros(2, np.uint32)
    launch(probes.probe_flag, 1, 1, words, report, 9, 20)
    assert report.tolist() == [1, 0]

    counter = probes.probe_counter

    def without_the_last(words, report, steps, patience):  # type: ignore[no-untyped-def]
        if cuda.blockIdx.x < 2:
            counter(words, report, steps, patience)

    words, report = np.zeros(1, np.uint64), np.zeros(3, np.uint32)
    launch(without_the_last, 3, 2, words, report, 2, 20)
    assert report.tolist() == [1, 1, 0]


def test_nothing() -> None:
    assert launch(probes.probe_launch, 2, 32).threads == 64


def compiled(kind: Any, target: tuple[int, int]) -> compiler.Compiled:
    spec = KernelSpec(kind, None, "tanh", "float32")
    return compiler.compile_kernel(build(spec), signature(spec), target, spec.threads)


@pytest.mark.parametrize("target", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", KINDS)
def test_machine_code(kind: str, target: tuple[int, int]) -> None:
    """Nothing is spilled, and a loop has what it is timed for in it."""
    if kind in CLUSTERED and target < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    kernel = compiled(kind, target)
    try:
        found = resources.of_kernel(kernel)
        code = resources.sass_of(kernel)
    except ToolMissing as e:
        pytest.skip(str(e))
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0)
    assert found.registers <= 64
    wanted = {
        "probe_launch": "EXIT",
        "probe_l2": "LDG.E.STRONG.GPU",
        "probe_remote": "LD.E",
        "probe_cluster": "UCGABAR",
        "probe_cluster_stores": "UCGABAR",
        "probe_flag": "LDG.E.64.STRONG.GPU",
        "probe_counter": "LDG.E.64.STRONG.GPU",
    }
    assert wanted[kind] in code
