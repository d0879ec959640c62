"""Softmax, loss and gradient in one kernel, under the emulator, and its options in NumPy."""

import math
from collections.abc import Iterator
from typing import Any

import kernel_setup  # noqa: F401  (skips without what the emulator needs)
import ml_dtypes
import numpy as np
import pytest
from gradcheck import check_gradients
from loss_setup import OPTIONS, Array, assert_loss_as_reference, exact, logits, spelled_out
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import emulator
from gpurnn import functional as F
from gpurnn.cuda import losses
from gpurnn.cuda.engines import EmulatedEngine, current_emulation
from gpurnn.cuda.specs import KernelSpec, build
from gpurnn.loss import perplexity

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
each_float = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: np.dtype(d).name)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

# A row to a warp up to 256 columns, a power of two of them to a lane; then to a block.
SHAPES = [(1, 1), (3, 2), (33, 28), (3, 32), (9, 33), (1, 100), (2, 256), (3, 257), (2, 1025)]
EVERY = [
    pytest.param(N, q, dtype, options, id=f"{N}-{q}-{np.dtype(dtype).name}-{name}")
    for N, q in SHAPES
    for dtype in DTYPES
    for name, options in OPTIONS.items()
    if dtype in DTYPES[:2] or name == "both" or q in (28, 257)
]


@pytest.fixture
def engine() -> Iterator[EmulatedEngine]:
    with gpurnn.emulated():
        found = current_emulation()
        assert found is not None
        yield found


# Against the reference


@pytest.mark.parametrize(("N", "q", "dtype", "options"), EVERY)
def test_loss_and_gradient_are_the_reference_s(
    N: int, q: int, dtype: Any, options: dict[str, Any]
) -> None:
    O, targets = logits(N, q, dtype)
    options = spelled_out(options, targets)
    before = O.copy()
    with gpurnn.emulated():
        loss, dO = F.cross_entropy(O, targets, **options)
    assert isinstance(loss, float)
    assert_loss_as_reference(O, targets, loss, dO, options)
    assert O.tobytes() == before.tobytes()
    assert not np.shares_memory(O, dO)


def test_a_large_vocabulary() -> None:
    O, targets = logits(2, 20_011, np.float32)
    targets[1] = 20_010
    for options in ({}, {"label_smoothing": 0.1}):
        with gpurnn.emulated():
            loss, dO = F.cross_entropy(O, targets, **options)
        assert_loss_as_reference(O, targets, loss, dO, options)


def test_sizes_of_blocks() -> None:
    """What the tests above take for granted, and that nothing is left out between two sizes."""
    columns = {q: losses.softmax_sizes(q).columns for q in (1, 28, 32, 33, 64, 65, 128, 129, 256)}
    assert columns == {1: 1, 28: 1, 32: 1, 33: 2, 64: 2, 65: 4, 128: 4, 129: 8, 256: 8}
    threads = {
        q: losses.softmax_sizes(q).threads for q in (257, 1024, 1025, 16_384, 16_385, 200_000)
    }
    assert threads == {257: 128, 1024: 128, 1025: 256, 16_384: 256, 16_385: 512, 200_000: 512}
    assert {losses.softmax_sizes(q).columns for q in threads} == {0}


@each_dtype
@pytest.mark.parametrize(("N", "q"), [(1, 1), (9, 33), (3, 257)], ids=str)
def test_the_loss_of_each_row(N: int, q: int, dtype: Any) -> None:
    O, targets = logits(N, q, dtype)
    before = O.copy()
    for ignored in (None, int(targets[0]), -100):
        with gpurnn.emulated():
            nll = F.negative_log_likelihood(O, targets, ignore_index=ignored)
        real = np.dtype(np.float32) if O.dtype.itemsize == 2 else O.dtype
        assert (nll.shape, nll.dtype) == ((N,), real)
        truth = F.negative_log_likelihood(O.astype(np.float64), targets, ignore_index=ignored)
        assert (nll[targets == ignored] == 0).all() and (truth[targets == ignored] == 0).all()
        largest = 1 + np.abs(O.astype(np.float64)).max()
        assert_close("nll", nll + largest, truth + largest, length=q, dtype=real)
    assert O.tobytes() == before.tobytes()


@each_option
@pytest.mark.parametrize("ids", [np.int32, np.int64, np.uint8], ids=lambda d: np.dtype(d).name)
def test_shapes_and_types_of_targets(ids: Any, options: dict[str, Any]) -> None:
    O, targets = logits(6, 5, np.float32)
    options = spelled_out(options, targets)
    cut_O = np.repeat(O.reshape(2, 3, 5), 2, axis=-1)[..., ::2]  # not contiguous
    cut = np.repeat(targets.reshape(2, 3), 2, axis=1)[:, ::2].astype(ids)
    with gpurnn.emulated():
        loss, dO = F.cross_entropy(O, targets, **options)
        same, shaped = F.cross_entropy(cut_O, cut, **options)
        nll = F.negative_log_likelihood(cut_O, cut)
    assert loss == same and shaped.shape == (2, 3, 5) and nll.shape == (2, 3)
    assert_same_bits("dO", shaped.reshape(6, 5), dO)
    with gpurnn.emulated():
        assert F.negative_log_likelihood(np.ones(5), np.array(2)).shape == ()
        assert F.negative_log_likelihood(np.ones((0, 5)), np.ones(0, int)).shape == (0,)


# What a language model does with it


@pytest.mark.parametrize("q", [1, 2, 28, 257])
@each_float
def test_a_uniform_model_has_perplexity_q(q: int, dtype: Any) -> None:
    for logit in (0.0, 1e4, -1e4):
        O = np.full((3, q), logit, dtype)
        targets = np.array([0, q // 2, q - 1])
        with gpurnn.emulated():
            loss, dO = F.cross_entropy(O, targets)
            nll = F.negative_log_likelihood(O, targets)
        assert_close("perplexity", perplexity(nll), np.array(float(q)), length=q, dtype=dtype)
        assert_close("loss", loss, np.array(math.log(q)), length=1, dtype=dtype)
        assert_close("p", 3 * dO[0, 1:], np.full(q - 1, 1 / q), length=1)


@each_option
@pytest.mark.parametrize(("N", "q"), [(5, 28), (3, 100), (2, 300)], ids=str)
def test_rows_of_the_gradient_sum_to_zero(N: int, q: int, options: dict[str, Any]) -> None:
    for scale in (1, 1e4):
        O, targets = logits(N, q, np.float32)
        with gpurnn.emulated():
            _, dO = F.cross_entropy(np.float32(scale) * O, targets, **spelled_out(options, targets))
        largest = np.abs(dO).max(axis=1).astype(np.float64)
        assert_close("sums", dO.sum(axis=1) + largest, largest, length=q, dtype=np.float32)


# Numbers at the ends of the range


@pytest.mark.parametrize("fill", [0, 40, 300], ids=["warp", "warp-many", "block"])
@each_float
def test_enormous_and_impossible_logits(dtype: Any, fill: int) -> None:
    """Columns of probability 0 behind change nothing, whichever kernel they call for."""
    rows = [[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [-np.inf, 0, 0], [0, -np.inf, 0]]
    targets = np.array([1, 1, 2, 1, 0])
    O = np.full((5, 3 + fill), -np.inf, dtype)
    O[:, :3] = rows
    with gpurnn.emulated():
        loss, dO = F.cross_entropy(O, targets)
        nll = F.negative_log_likelihood(O, targets)
    expected = [2e4, math.log(2), math.log(3), math.log(2), math.log(2)]
    assert_close("nll", nll, np.array(expected), length=3)
    assert_close("loss", loss, np.array(sum(expected) / 5), length=3, dtype=dtype)
    thirds = [[1, -1, 0], [0, -1 / 2, 1 / 2], [1 / 3, 1 / 3, -2 / 3]]
    thirds += [[0, -1 / 2, 1 / 2], [-1 / 2, 0, 1 / 2]]
    assert_close("dO", dO[:, :3], np.array(thirds) / 5, length=3)
    assert (dO[:, 3:] == 0).all()


def assert_same_where_not_finite(O: Array, targets: Array, **options: Any) -> None:
    """Require infinities and NaN in the same places as the float64 reference has them."""
    from gpurnn import reference

    ignored = options.get("ignore_index")
    smoothing = options.get("label_smoothing", 0.0)
    with np.errstate(all="ignore"):
        truth, gradient = reference.cross_entropy(O.astype(np.float64), targets, ignored, smoothing)
    with gpurnn.emulated():
        loss, dO = F.cross_entropy(O, targets, **options)
    np.testing.assert_allclose(loss, truth, rtol=1e-6)
    np.testing.assert_allclose(dO, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("q", [3, 40, 300])
@each_float
def test_rows_without_a_softmax(dtype: Any, q: int, value: float, smoothing: float) -> None:
    """The others know nothing of them."""
    for where in (0, 1, q - 1, slice(None)):
        O, targets = logits(3, q, dtype)
        O[1, where] = value
        for target in (0, q - 1) if where in (0, q - 1) else (0,):
            targets[1] = target
            assert_same_where_not_finite(O, targets, label_smoothing=smoothing)


@pytest.mark.parametrize("q", [3, 40, 300])
@each_float
def test_ignored_rows_may_hold_anything(dtype: Any, q: int) -> None:
    for value in (np.nan, np.inf, -np.inf):
        O, targets = logits(3, q, dtype)
        targets[:] = 1, -100, 2
        expected, gradient = exact(O, targets, ignore_index=-100)
        O[1] = value
        for context in (gpurnn.emulated(), np.errstate()):
            with context:
                loss, dO = F.cross_entropy(O, targets, ignore_index=-100)
                nll = F.negative_log_likelihood(O, targets, ignore_index=-100)
            assert loss == pytest.approx(expected, rel=1e-6)
            assert (dO[1] == 0).all() and nll[1] == 0
            assert_close("dO", dO, gradient, length=q)


@pytest.mark.parametrize("q", [3, 300])
def test_where_all_rows_are_ignored(q: int) -> None:
    """As PyTorch: the mean of nothing is NaN, its gradient 0; NumPy and kernels alike."""
    O, targets = logits(3, q, np.float32)
    targets[:] = 2
    for context in (gpurnn.emulated(), np.errstate()):
        with context:
            loss, dO = F.cross_entropy(O, targets, ignore_index=2)
        assert np.isnan(loss)
        assert (dO == 0).all()


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
@pytest.mark.parametrize("fill", [0, 300])
def test_a_target_that_is_none_makes_its_loss_nan(
    engine: EmulatedEngine, bad: int, fill: int
) -> None:
    """Where nobody looked: it is seen in the loss, and reads nothing it must not."""
    O, targets = logits(3, 5 + fill, np.float32)
    targets = targets.astype(np.int32)
    targets[1] = bad + fill if bad == 5 else bad
    nll = losses.negative_log_likelihood(engine, O, targets)
    assert np.isnan(nll).tolist() == [False, True, False]
    loss, _ = losses.cross_entropy(engine, O, targets)
    assert np.isnan(loss[0])


# What the training step calls


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["both"]], ids=["plain", "both"])
@pytest.mark.parametrize(("N", "q"), [(9, 28), (1, 28), (3, 100), (3, 300)], ids=str)
@each_dtype
def test_the_bias_is_added_in_the_same_pass(
    engine: EmulatedEngine, N: int, q: int, dtype: Any, options: dict[str, Any]
) -> None:
    O, targets = logits(N, q, dtype)
    b_q = logits(1, q, dtype, seed=1)[0][0]
    options = spelled_out(options, targets)
    with_bias = O.astype(np.float64) + b_q.astype(np.float64)
    truth, gradient = exact(with_bias, targets, **options)
    loss, dO = losses.cross_entropy(engine, O, targets.astype(np.int32), b_q=b_q, **options)
    assert dO is O and (loss.shape, loss.dtype) == ((1,), np.float64)
    assert np.isnan(loss[0]) if np.isnan(truth) else loss[0] == pytest.approx(truth, rel=1e-5)
    u = float(ml_dtypes.finfo(dtype).eps)
    scale = max(1e-30, float(np.abs(gradient).max()))
    limit = max(u, 1e-6 if dtype != np.float64 else 1e-13) * scale
    assert np.abs(dO.astype(np.float64) - gradient).max() <= limit


def test_no_row(engine: EmulatedEngine) -> None:
    O, targets = np.ones((0, 5), np.float32), np.ones(0, np.int32)
    for options in ({}, {"ignore_index": 1}):
        loss, dO = losses.cross_entropy(engine, O, targets, **options)
        assert np.isnan(loss[0]) and dO.shape == (0, 5)


def test_losses_are_added_in_float64(engine: EmulatedEngine) -> None:
    """A float32 sum that holds 2²⁵ loses what is added to it."""
    O = np.zeros((33, 2), np.float32)
    O[:, 1] = np.log(np.expm1(0.5))
    O[0, 1] = 2.0**25
    targets = np.zeros(33, np.int32)
    targets[1::2] = -1
    nll = losses.negative_log_likelihood(engine, O, targets, ignore_index=-1).astype(np.float64)
    loss, _ = losses.cross_entropy(engine, O, targets, ignore_index=-1)
    assert loss[0] == pytest.approx(nll.sum() / 17, rel=1e-14)


@pytest.mark.parametrize("N", [1, 31, 256, 257, 3001, 20_000])
def test_means_and_counts_of_many_rows(N: int) -> None:
    rng = np.random.default_rng(N)
    found = rng.exponential(size=N).astype(np.float32)
    targets = rng.integers(0, 3, N).astype(np.int32)
    counts, mean = np.full(1, -1, np.int64), np.full(1, np.nan)
    shape = losses._one_block(N)
    count = build(KernelSpec("target_count", losses.ONE_BLOCK, "identity", "float32"))
    average = build(KernelSpec("loss_mean", losses.ONE_BLOCK, "identity", "float32"))
    means = set()
    for seed in (None, 1):
        emulator.launch(count, *shape, (targets, counts, 1), seed=seed)
        assert counts[0] == np.count_nonzero(targets != 1)
        emulator.launch(average, *shape, (found, counts, mean, 0), seed=seed)
        if counts[0]:
            total = math.fsum(found)
            assert mean[0] == pytest.approx(total / int(counts[0]), rel=1e-14)
        means.add(mean.tobytes())
    assert len(means) == 1
    emulator.launch(average, *shape, (found, np.zeros(1, np.int64), mean, N))
    assert mean[0] == pytest.approx(math.fsum(found) / N, rel=1e-14)


@each_option
@pytest.mark.parametrize(("N", "q"), [(9, 33), (3, 300)], ids=str)
def test_every_schedule_gives_the_same_bits(N: int, q: int, options: dict[str, Any]) -> None:
    O, targets = logits(N, q, np.float32)
    options = spelled_out(options, targets)
    found = []
    for seed in (None, 1, 2, 3):
        with gpurnn.emulated(seed=seed):
            found.append(F.cross_entropy(O, targets, **options))
    for loss, dO in found[1:]:
        assert np.float64(loss).tobytes() == np.float64(found[0][0]).tobytes()
        assert_same_bits("dO", dO, found[0][1])


def test_rows_know_nothing_of_each_other() -> None:
    O, targets = logits(12, 33, np.float32)
    with gpurnn.emulated():
        nll = F.negative_log_likelihood(O, targets)
        alone = [F.negative_log_likelihood(O[i : i + 1], targets[i : i + 1]) for i in range(12)]
    assert_same_bits("nll", np.concatenate(alone), nll)


def test_lanes_read_neighbouring_columns() -> None:
    """28 logits of 4 bytes lie in 4 sectors, or 5: no more are read, and none twice."""
    O, targets = logits(8, 28, np.float32)
    sizes = losses.softmax_sizes(28)
    report = emulator.launch(
        build(KernelSpec("cross_entropy", sizes, "identity", "float32")),
        1,
        sizes.threads,
        (
            O,
            O,
            targets.astype(np.int32),
            np.zeros(8, np.float32),
            np.zeros(1, np.float32),
            np.zeros(1, np.float32),
            np.zeros(1, np.int64),
            losses.NONE_IGNORED,
            8,
        ),
        measure=True,
    )
    assert report.traffic is not None
    of_rows = [t for t in report.traffic if t.space == "global" and t.ideal >= 8 * 4]
    assert [t.kind for t in of_rows] == ["read", "write"]
    for t in of_rows:
        assert t.instructions == 8 and t.needed <= 8 * 5


# The new options of the NumPy reference


@each_option
@pytest.mark.parametrize("shape", [(1, 1), (5,), (4, 3, 5)], ids=str)
def test_gradients_equal_finite_differences(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(shape)
    O, targets = 2 * rng.standard_normal(shape), np.array(rng.integers(0, shape[-1], shape[:-1]))
    options = spelled_out(options, targets.reshape(-1))
    if (targets == options.get("ignore_index")).all():
        options["ignore_index"] = -1
    _, dO = F.cross_entropy(O, targets, **options)
    check_gradients(lambda O: F.cross_entropy(O, targets, **options)[0], {"O": O}, {"O": dO})


def test_smoothed_labels_by_hand() -> None:
    O = np.log(np.array([[0.5, 0.25, 0.25]]))
    loss, dO = F.cross_entropy(O, np.array([0]), label_smoothing=0.3)
    assert loss == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4), rel=1e-14)
    np.testing.assert_allclose(dO, [[0.5 - 0.8, 0.15, 0.15]], rtol=1e-14)


def test_ignored_rows_leave_the_mean_of_the_others() -> None:
    O, targets = logits(12, 5)
    targets[::3] = -7
    loss, dO = F.cross_entropy(O, targets, ignore_index=-7)
    others = targets != -7
    expected, gradient = F.cross_entropy(O[others], targets[others])
    assert loss == expected
    assert_same_bits("dO", dO[others], gradient)
    assert not dO[~others].any()


@each_option
@each_float
def test_as_torch(dtype: Any, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is what this compares with")
    O, targets = logits(33, 28, dtype)
    options = spelled_out(options, targets)

    def of_torch(O: Array) -> tuple[Array, Array]:
        leaf = torch.tensor(O).requires_grad_()
        theirs = {k: v for k, v in options.items() if v is not None}
        loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(targets), **theirs)
        loss.backward()
        return loss.detach().numpy(), leaf.grad.numpy()

    truth, gradient = of_torch(O.astype(np.float64))
    lost = of_torch(O) if dtype == np.float32 else (None, None)
    for context in (gpurnn.emulated(), np.errstate()):
        with context:
            loss, dO = F.cross_entropy(O, targets, **options)
        assert_close("loss", loss, truth, length=28, baseline=lost[0], dtype=dtype)
        assert_close("dO", dO, gradient, length=28, baseline=lost[1])
