"""Losses and dropout as the host queues them, without a GPU: CuPy is a stand-in."""

from collections.abc import Iterator
from typing import Any

import fake_cupy
import kernel_setup  # noqa: F401  (skips without what the emulator needs)
import ml_dtypes
import numpy as np
import pytest
from loss_setup import OPTIONS, logits, spelled_out
from tolerance import assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn.cuda import losses, noise
from gpurnn.cuda.engines import GPUEngine

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.FakeCuPy]:
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()


def host(a: Any) -> Any:
    return a.view(np.ndarray)


@each_option
@pytest.mark.parametrize("q", [28, 300])
@each_dtype
def test_losses_have_the_bits_of_the_emulator(
    cupy: fake_cupy.FakeCuPy, dtype: Any, q: int, options: dict[str, Any]
) -> None:
    O, targets = logits(3, q, dtype)
    options = spelled_out(options, targets)
    with gpurnn.emulated():
        expected, gradient = F.cross_entropy(O, targets, **options)
        rows = F.negative_log_likelihood(O, targets, ignore_index=options.get("ignore_index"))
    theirs, ids = cupy.new(O), cupy.new(targets)
    loss, dO = F.cross_entropy(theirs, ids, **options)
    nll = F.negative_log_likelihood(theirs, ids, ignore_index=options.get("ignore_index"))
    assert isinstance(loss, fake_cupy.Array)
    assert (loss.shape, loss.dtype) == ((), np.float64)
    assert host(loss).tobytes() == np.float64(expected).tobytes()
    assert host(dO).tobytes() == gradient.tobytes()
    assert_same_bits("nll", host(nll), rows)
    assert host(theirs).tobytes() == O.tobytes()


@each_dtype
def test_dropout_has_the_bits_of_the_emulator(cupy: fake_cupy.FakeCuPy, dtype: Any) -> None:
    H = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    with gpurnn.emulated():
        expected = F.dropout(H, 0.3, seed=1, update=2)
    for update in (2, np.int64(2), cupy.new(np.array([2])), cupy.new(np.array(2))):
        found = F.dropout(cupy.new(H), 0.3, seed=1, update=update)
        assert isinstance(found, fake_cupy.Array)
        assert host(found).tobytes() == expected.tobytes()


def test_on_a_device_that_is_not_the_current_one(cupy: fake_cupy.FakeCuPy) -> None:
    O, targets = logits(4, 5, np.float32)
    with cupy.cuda.Device(3):
        theirs, ids, update = cupy.new(O), cupy.new(targets), cupy.new(np.array([1]))
    loss, dO = F.cross_entropy(theirs, ids, ignore_index=0, label_smoothing=0.1)
    found = [
        loss,
        dO,
        F.negative_log_likelihood(theirs, ids),
        F.dropout(theirs, 0.5, seed=0, update=update),
    ]
    assert {a.device.id for a in found} == {3}
    assert {device for _, device in cupy.launches} == {3}


def test_arrays_apart_are_refused(cupy: fake_cupy.FakeCuPy) -> None:
    O, targets = logits(4, 5, np.float32)
    for loss in (F.cross_entropy, F.negative_log_likelihood):
        with pytest.raises(TypeError, match=r"^O is a .* on a GPU but targets is a numpy.ndarray"):
            loss(cupy.new(O), targets)
    with pytest.raises(TypeError, match=r"^H is a .* on a GPU but update is a numpy.ndarray"):
        F.dropout(cupy.new(O), 0.5, seed=0, update=np.array([1]))
    with pytest.raises(TypeError, match=r"^update has dtype int32: expected int64"):
        F.dropout(cupy.new(O), 0.5, seed=0, update=cupy.new(np.ones(1, np.int32)))


def test_targets_are_looked_at_unless_they_are_known(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    O, targets = logits(4, 5, np.float32)
    targets[2] = 7
    theirs, ids = cupy.new(O), cupy.new(targets)
    for loss in (F.cross_entropy, F.negative_log_likelihood):
        with pytest.raises(ValueError, match=r"^targets holds the id 7 at index \(2,\): O has 5"):
            loss(theirs, ids)
        with pytest.raises(ValueError, match=r"^targets holds the id 7 at index \(2,\): O has 5"):
            loss(theirs, ids, ignore_index=0)
        loss(theirs, ids, ignore_index=7)

    def waits(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the GPU")

    monkeypatch.setattr(fake_cupy.Array, "min", waits)
    mean, _ = F.cross_entropy(theirs, ids, check_ids=False)
    assert np.isnan(mean)
    F.negative_log_likelihood(theirs, ids, ignore_index=7, check_ids=False)


def test_how_many_launches_there_are(cupy: fake_cupy.FakeCuPy) -> None:
    O, targets = logits(4, 5, np.float32)
    theirs, ids = cupy.new(O), cupy.new(targets)

    def kinds(*arguments: Any, **options: Any) -> list[str]:
        cupy.launches.clear()
        F.cross_entropy(*arguments, **options)
        return [spec.kind for spec, _ in cupy.launches]

    assert kinds(theirs, ids) == ["cross_entropy", "loss_mean"]
    assert kinds(theirs, ids, label_smoothing=0.1) == ["cross_entropy", "loss_mean"]
    assert kinds(theirs, ids, ignore_index=1) == ["target_count", "cross_entropy", "loss_mean"]


@pytest.mark.parametrize("ignored", [None, 2])
def test_all_of_it_can_be_captured_and_reads_the_arrays_of_then(
    cupy: fake_cupy.FakeCuPy, ignored: int | None
) -> None:
    """Kernels alone are queued: no copy, no look at a number, nothing set up the second time."""
    engine = GPUEngine(0)
    O, targets = logits(6, 5, np.float32)
    other, others = logits(6, 5, np.float32, seed=1)
    theirs, ids = cupy.new(O), cupy.new(targets.astype(np.int32))
    H, update = cupy.new(O), cupy.new(np.array([0]))
    options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": 0.1}

    def step() -> Any:
        noise.dropout(engine, H, 0.5, 3, update, out=H)
        return losses.cross_entropy(engine, theirs, ids, **options)

    step()
    cupy.pool = []  # the graph's own: what is freed is not given out again
    theirs[...], H[...] = cupy.array(O), cupy.array(O)
    before = host(theirs).copy()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        loss, dO = step()
        graph = stream.end_capture()
    assert_same_bits("O", host(theirs), before)
    for number, (logits_, ids_) in enumerate(((O, targets), (other, others)), 5):
        put = cupy.array
        theirs[...], H[...], ids[...], update[0] = put(logits_), put(O), put(ids_), number
        graph.launch()
        expected, gradient = F.cross_entropy(logits_, ids_, **options)
        assert float(loss[0]) == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(host(dO), gradient, atol=1e-7)
        assert_same_bits("H", host(H), F.dropout(O, 0.5, seed=3, update=number))
