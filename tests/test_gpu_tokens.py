"""Token ids on a GPU: rows that kernels fetch, gradients added up by id, all of it captured."""

import math
from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case, draw
from gpu_setup import GPU, assert_as_reference, cp, gpu
from tolerance import assert_close, assert_same_bits

from gpurnn import Activation
from gpurnn import functional as F
from gpurnn.cuda.engines import limits_of
from gpurnn.planning import Group, scatter_plan

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

PRIME = next(case for case in SMALL if case.name == "prime")
LEAKY = Activation(
    lambda z: 0.9 * math.tanh(z) + 0.1 * z, lambda z: 1 - 0.9 * math.tanh(z) ** 2, name="leaky"
)  # φ′ is a function of the pre-activation

SHAPES = (
    Case("characters", T=32, n=64, d=28, h=32),
    Case("wide", T=9, n=5, d=28, h=512),
    Case("one-row", T=40, n=1, d=300, h=224),
    Case("words", T=12, n=33, d=4580, h=100),
    Case("many-words", T=5, n=7, d=100_000, h=130),
    Case("two", T=65, n=3, d=2, h=17),
)


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", [None, "resident", "step", "gemm", "group"])
def test_ids(gpu: GPU, kernel: str | None, case: Case) -> None:
    if kernel == "resident" and case.h > 300:
        pytest.skip("one block does not hold W_hh")
    assert_as_reference(gpu, case, draw(case, dtype=np.float32), kernel=kernel, by_id=True)


@pytest.mark.parametrize("exchange", ["cluster", "flags", "counter"])
def test_groups(gpu: GPU, exchange: str) -> None:
    if exchange == "cluster" and limits_of(gpu.cp.cuda.Device().id).largest_cluster < 4:
        pytest.skip("no clusters")
    drawn = draw(Case("", T=11, n=9, d=28, h=320), dtype=np.float32)
    arguments = [gpu.put(a) for a in drawn.arguments(by_id=True)]
    H, _ = F.rnn_forward(*arguments, kernel=Group(4, exchange))
    truth, _ = F.rnn_forward(*drawn.astype(np.float64).arguments(by_id=True))
    baseline, _ = F.rnn_forward(*drawn.arguments(by_id=True))
    assert_close("H", gpu.get(H), truth, length=11 * 360, baseline=baseline)


@pytest.mark.parametrize("kernel", ["resident", "step", "gemm", "group"])
def test_an_activation_that_wants_pre_activations(gpu: GPU, kernel: str) -> None:
    assert_as_reference(gpu, PRIME, draw(PRIME, dtype=np.float32), LEAKY, kernel=kernel, by_id=True)


def rows(gpu: GPU, N: int, d: int, h: int, skewed: bool) -> tuple[Any, Any]:
    rng = np.random.default_rng([N, d, h])
    ids = rng.zipf(1.3, N) % d if skewed else rng.integers(0, d, N)
    return gpu.put(ids.astype(np.int32)), gpu.put(rng.standard_normal((N, h), np.float32))


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize(
    ("N", "d", "h"),
    [
        (1, 1, 1),
        (32_768, 2, 1),
        (32_768, 28, 32),
        (32_768, 28, 513),
        (50_001, 1000, 128),
        (32_768, 100_000, 128),
        (40_000, 100_000, 300),
        (1_000_003, 28, 64),
    ],
)
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_rows_are_added_up_by_id(gpu: GPU, name: str, N: int, d: int, h: int, skewed: bool) -> None:
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype = np.dtype(getattr(dtypes, name) if name == "bfloat16" else name)
    ids, dZ = rows(gpu, N, d, h, skewed)
    dX = gpu.put(gpu.get(dZ).astype(dtype))
    found = F.embedding_backward(dX, ids, d)
    again = F.embedding_backward(dX, ids, d, check_ids=False)
    assert found.dtype == dtype and found.shape == (d, h)
    a = gpu.get(found)
    assert_same_bits("again", gpu.get(again).view(np.uint8), a.view(np.uint8))
    truth = F.embedding_backward(gpu.get(dX).astype(np.float64), gpu.get(ids), d)
    if dtype.itemsize == 2:
        u = float(dtypes.finfo(dtype).eps) / 2
        single = 4 * N**0.5 * 2.0**-24 * np.abs(truth).max()
        error = np.abs(a.astype(np.float64) - truth)
        assert (error <= 1.02 * u * np.abs(truth) + single).all()
    else:
        assert_close("dE", a, truth, length=N)


def test_one_id_alone_and_what_is_not_finite(gpu: GPU) -> None:
    ids = gpu.put(np.full(20_000, 3, np.int64))
    dX = gpu.cp.ones((20_000, 33), np.float32)
    for d in (4, 50_000):
        dE = gpu.get(F.embedding_backward(dX, ids, d))
        assert (dE[3] == 20_000).all() and not np.delete(dE, 3, axis=0).any()
    ids[777], dX[777, 5] = 2, np.nan
    for d in (4, 50_000):
        dE = gpu.get(F.embedding_backward(dX, ids, d))
        assert np.argwhere(np.isnan(dE)).tolist() == [[2, 5]]


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_an_embedding(gpu: GPU, name: str) -> None:
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype = np.dtype(getattr(dtypes, name) if name == "bfloat16" else name)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (7, 3, 5))
    E = rng.standard_normal((1000, 33)).astype(dtype)
    X = gpu.get(F.embedding(gpu.put(ids), gpu.put(E)))
    assert_same_bits("X", X.view(np.uint8), E[ids].view(np.uint8))
    ids[1, 2, 3] = 1000
    with pytest.raises(
        ValueError, match=r"^ids holds the id 1000 at index \(1, 2, 3\): E has 1000"
    ):
        F.embedding(gpu.put(ids), gpu.put(E))


@pytest.mark.parametrize("kernel", ["resident", "group"])
def test_a_captured_pass_takes_other_ids(gpu: GPU, kernel: str) -> None:
    case = Case("", T=64, n=40, d=6, h=64)
    cp = gpu.cp
    drawn = draw(case, dtype=np.float32)
    ids, *rest = (gpu.put(a) for a in drawn.arguments(by_id=True))
    ids, dH, E = ids.astype(np.int32), gpu.put(drawn.dH), gpu.put(drawn.W_xh)
    assert scatter_plan(64 * 40, 6, 64, "float32", limits_of(cp.cuda.Device().id)).parts > 1

    def run() -> list[Any]:
        H, residuals = F.rnn_forward(ids, *rest, kernel=kernel, check_ids=False)
        _, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(dH, residuals)
        X = F.embedding(ids, E, check_ids=False)
        return [H, dh_0, dW_xh, dW_hh, db_h, X, F.embedding_backward(X, ids, 6, check_ids=False)]

    run()
    cp.cuda.Device().synchronize()
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        captured = run()
        graph = stream.end_capture()
    for seed in (1, 2):
        ids[...] = cp.asarray(np.random.default_rng(seed).integers(0, 6, (64, 40)), np.int32)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        found = [gpu.get(a) for a in captured]
        names = ("H", "dh_0", "dW_xh", "dW_hh", "db_h", "X", "dE")
        for name, a, b in zip(names, found, run(), strict=True):
            if name in ("dW_hh", "db_h"):  # cuBLAS's, by another call
                np.testing.assert_allclose(a, gpu.get(b), rtol=1e-4, atol=1e-3)
            else:
                assert_same_bits(name, a, gpu.get(b))
