"""Losses and dropout on a GPU, against the reference in float64 and NumPy's masks."""

import math
from typing import Any

import numpy as np
import pytest
from gpu_setup import GPU, cp, gpu
from loss_setup import OPTIONS, Array, assert_loss_as_reference, logits, spelled_out
from tolerance import assert_close, assert_same_bits

from gpurnn import functional as F
from gpurnn.cuda import losses, noise
from gpurnn.cuda.engines import GPUEngine

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 1),
    (3, 2),
    (33, 28),
    (1000, 28),
    (9, 33),
    (65, 100),
    (31, 256),
    (33, 257),
    (17, 1025),
    (40, 4580),
    (7, 16_385),
    (3, 100_003),
]

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_name = pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
each_float = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def dtype_of(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)


@each_option
@each_name
@pytest.mark.parametrize(("N", "q"), SHAPES, ids=str)
def test_loss_and_gradient(gpu: GPU, N: int, q: int, name: str, options: dict[str, Any]) -> None:
    O, targets = logits(N, q, dtype_of(name))
    options = spelled_out(options, targets)
    theirs = gpu.put(O)
    loss, dO = F.cross_entropy(theirs, gpu.put(targets), **options)
    assert (loss.shape, loss.dtype) == ((), np.float64)
    assert_loss_as_reference(O, targets, float(loss), gpu.get(dO), options)
    assert gpu.get(theirs).tobytes() == O.tobytes()


@each_float
@pytest.mark.parametrize(("N", "q"), SHAPES, ids=str)
def test_the_loss_of_each_row(gpu: GPU, N: int, q: int, dtype: Any) -> None:
    O, targets = logits(N, q, dtype)
    for ignored in (None, int(targets[0])):
        found = F.negative_log_likelihood(gpu.put(O), gpu.put(targets), ignore_index=ignored)
        truth = F.negative_log_likelihood(O.astype(np.float64), targets, ignore_index=ignored)
        largest = 1 + np.abs(O.astype(np.float64)).max()
        assert_close("nll", gpu.get(found) + largest, truth + largest, length=q, dtype=dtype)


@each_name
@pytest.mark.parametrize("q", [28, 100, 300])
def test_the_bias_is_added_in_the_same_pass(gpu: GPU, q: int, name: str) -> None:
    O, targets = logits(37, q, dtype_of(name))
    b_q = logits(1, q, O.dtype, seed=1)[0][0]
    truth, gradient = F.cross_entropy(O.astype(np.float64) + b_q.astype(np.float64), targets)
    engine = GPUEngine(gpu.cp.cuda.Device().id)
    theirs = gpu.put(O)
    loss, dO = losses.cross_entropy(engine, theirs, gpu.put(targets), b_q=gpu.put(b_q))
    assert dO is theirs
    assert float(loss[0]) == pytest.approx(truth, rel=1e-5)
    u = 2.0**-7 if O.dtype.itemsize == 2 else 1e-6
    assert np.abs(gpu.get(dO).astype(np.float64) - gradient).max() <= u * np.abs(gradient).max()


@pytest.mark.parametrize("q", [28, 257, 5000])
@each_float
def test_ends_of_the_range(gpu: GPU, dtype: Any, q: int) -> None:
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [-np.inf, 0, 0], [0, -np.inf, 0]]
    O, targets = np.full((5, q), -np.inf, dtype), np.array([1, 1, 2, 1, 0])
    O[:, :3] = rows
    nll = F.negative_log_likelihood(gpu.put(O), gpu.put(targets))
    expected = [2e4, math.log(2), math.log(3), math.log(2), math.log(2)]
    assert_close("nll", gpu.get(nll), np.array(expected), length=3)
    _, dO = F.cross_entropy(gpu.put(O), gpu.put(targets))
    assert (gpu.get(dO)[:, 3:] == 0).all()
    for value in (np.nan, np.inf):
        O[1, q // 2] = value
        found = gpu.get(F.negative_log_likelihood(gpu.put(O), gpu.put(targets)))
        assert np.isnan(found).tolist() == [False, True, False, False, False]
        loss, dO = F.cross_entropy(gpu.put(O), gpu.put(targets))
        assert np.isnan(float(loss))
        assert np.isnan(gpu.get(dO)).any(axis=1).tolist() == [False, True, False, False, False]
        assert np.isnan(gpu.get(dO)[1]).all()
    targets[:] = 1
    loss, dO = F.cross_entropy(gpu.put(O), gpu.put(targets), ignore_index=1)
    assert np.isnan(float(loss)) and not gpu.get(dO).any()


def test_many_rows_and_the_same_bits_every_time(gpu: GPU) -> None:
    O, targets = logits(200_000, 28, np.float32)
    theirs, ids = gpu.put(O), gpu.put(targets)
    runs = [F.cross_entropy(theirs, ids, ignore_index=3, label_smoothing=0.1) for _ in range(3)]
    truth, gradient = F.cross_entropy(
        O.astype(np.float64), targets, ignore_index=3, label_smoothing=0.1
    )
    assert float(runs[0][0]) == pytest.approx(truth, rel=1e-6)
    largest = np.abs(gradient).max()
    assert_close("dO", gpu.get(runs[0][1]) / largest, gradient / largest, length=28)
    for loss, dO in runs[1:]:
        assert float(loss) == float(runs[0][0])
        assert_same_bits("dO", gpu.get(dO), gpu.get(runs[0][1]))


def masks_agree(gpu: GPU, H: Array, p: float, seed: int, update: int) -> None:
    real = H.astype(np.float32) if H.dtype.itemsize == 2 else H
    expected = F.dropout(real, p, seed=seed, update=update).astype(H.dtype)
    for number in (update, gpu.put(np.array([update]))):
        found = F.dropout(gpu.put(H), p, seed=seed, update=number)
        assert gpu.get(found).tobytes() == expected.tobytes()


@each_name
@pytest.mark.parametrize("size", [1, 3, 4, 1023, 1025, 1_000_003])
def test_dropout_is_numpy_s(gpu: GPU, size: int, name: str) -> None:
    H = np.random.default_rng(0).standard_normal(size).astype(dtype_of(name))
    for p, seed, update in ((0.0, 0, 0), (0.3, 7, 2**32 - 1), (0.7, (5 << 32) + 1, 12)):
        masks_agree(gpu, H, p, seed, update)


def test_captured_in_one_graph(gpu: GPU) -> None:
    """Logits, targets and the number of the update are those that lie there when it is launched."""
    cp = gpu.cp
    engine = GPUEngine(cp.cuda.Device().id)
    O, targets = logits(100, 28, np.float32)
    theirs, ids, H = gpu.put(O), gpu.put(targets.astype(np.int32)), gpu.put(O)
    update = gpu.put(np.zeros(1, np.int64))

    def step() -> Any:
        noise.dropout(engine, H, 0.5, 3, update, out=H)
        return losses.cross_entropy(engine, theirs, ids, ignore_index=2, label_smoothing=0.1)

    step()
    pool = cp.cuda.MemoryPool()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        loss, dO = step()
        graph = stream.end_capture()
    for number in (4, 5):
        other, others = logits(100, 28, np.float32, seed=number)
        for a, b in ((theirs, other), (H, O), (ids, others.astype(np.int32))):
            a.set(b)
        update.fill(number)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        options: dict[str, Any] = {"ignore_index": 2, "label_smoothing": 0.1}
        assert_loss_as_reference(other, others, float(loss[0]), gpu.get(dO), options)
        assert_same_bits("H", gpu.get(H), F.dropout(O, 0.5, seed=3, update=number))
