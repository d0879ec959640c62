"""The kernels on a GPU against the reference, and how they take arrays, streams and devices."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, CASES, EMPTY, SMALL, Case, Draw, draw, draw_off_kink
from gpu_setup import (
    GPU,
    NAMES,
    assert_as_reference,
    assert_halves_as_reference,
    cp,
    gpu,
    reference,
    results,
)
from tolerance import KINK_MARGIN, assert_close, assert_same_bits

from gpurnn import Activation, planning
from gpurnn import functional as F
from gpurnn.cuda import arrays, graphs
from gpurnn.cuda.engines import GPUEngine, limits_of

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

KERNELS = ("resident", "step", "concatenated", "gemm")
PRIME = next(case for case in SMALL if case.name == "prime")
HALF_CASES = [c for c in CASES if c.name in ("odd", "prime", "past-32", "past-64-one-row")]

LEAKY = Activation(
    lambda z: 0.9 * math.tanh(z) + 0.1 * z, lambda z: 1 - 0.9 * math.tanh(z) ** 2, name="leaky"
)  # φ′ is a function of the pre-activation

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


@pytest.mark.parametrize("case", CASES, ids=str)
@each_dtype
@each_kernel
def test_floats(gpu: GPU, kernel: str, dtype: Any, case: Case) -> None:
    assert_as_reference(gpu, case, draw(case, dtype=dtype), kernel=kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
@each_dtype
@pytest.mark.parametrize("kernel", ["resident", "step", "gemm"])
def test_ids_without_state_and_bias(gpu: GPU, kernel: str, dtype: Any, case: Case) -> None:
    drawn = draw(case, dtype=dtype)
    assert_as_reference(gpu, case, drawn, kernel=kernel, by_id=True, h_0=False, bias=False)


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@each_kernel
def test_half_types(gpu: GPU, kernel: str, name: str, case: Case) -> None:
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype = np.float16 if name == "float16" else dtypes.bfloat16
    assert_halves_as_reference(gpu, case, draw(case).astype(dtype), kernel)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@each_kernel
def test_empty(gpu: GPU, kernel: str, case: Case) -> None:
    drawn = draw(case, dtype=np.float32)
    truth = reference(drawn, "tanh", np.float32)
    for name, a in results(gpu, drawn, "tanh", kernel).items():
        assert_same_bits(name, a, truth[name])


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "tanh"])
@pytest.mark.parametrize("kernel", ["resident", "step", "gemm"])
def test_activations(gpu: GPU, kernel: str, activation: str) -> None:
    margin = KINK_MARGIN[np.dtype(np.float32)]
    drawn = draw_off_kink(PRIME, margin) if activation == "relu" else draw(PRIME)
    assert_as_reference(gpu, PRIME, drawn.astype(np.float32), activation, kernel=kernel)


@pytest.mark.parametrize("of_output", [False, True])
@each_kernel
def test_own_activation(gpu: GPU, kernel: str, of_output: bool) -> None:
    """A leaky tanh, and one whose derivative is a function of its output."""
    if of_output:
        own = Activation(lambda z: 2 * math.tanh(z), lambda y: 2 - y * y / 2, of_output=True)
    else:
        own = LEAKY
    assert_as_reference(gpu, PRIME, draw(PRIME, dtype=np.float32), own, kernel=kernel)


@each_kernel
def test_truncation(gpu: GPU, kernel: str) -> None:
    """Factors ξ, some of them 0, act on the gradient as in the reference."""
    drawn = draw(PRIME)
    xi = np.array([1, 0, 1, 0.5, 1.5, 0, 2.0])
    _, residuals = F.rnn_forward(*drawn.arguments())
    truth = F.rnn_backward(drawn.dH, residuals, xi=xi)
    _, residuals = F.rnn_forward(*(gpu.put(a) for a in drawn.arguments()), kernel=kernel)
    found = F.rnn_backward(gpu.put(drawn.dH), residuals, xi=gpu.put(xi))
    for name, a, b in zip(NAMES[1:], found, truth, strict=True):
        assert_close(name, gpu.get(a), b, length=PRIME.length)  # type: ignore[arg-type]


def assert_from_checkpoints(
    gpu: GPU, case: Case, drawn: Draw, activation: Any, kernel: str, by_id: bool, k: int
) -> None:
    """Hold the gradients from every k-th state against the reference's by the tests' rule."""
    truth = reference(drawn, activation, np.float64, by_id=by_id)
    single = drawn.X.dtype == np.float32
    baseline = reference(drawn, activation, np.float32, by_id=by_id) if single else {}
    arguments = [gpu.put(a) for a in drawn.arguments(by_id=by_id)]
    H, residuals = F.rnn_forward(
        *arguments, activation=activation, kernel=kernel, checkpoint_every=k
    )
    kept = gpu.get(H)
    assert residuals.states.shape == (-(-case.T // k), case.n, case.h)
    H.fill(np.nan)  # so that whatever still reads it is seen
    found = (
        kept,
        *(gpu.get(a) for a in F.rnn_backward(gpu.put(drawn.dH), residuals) if a is not None),
    )
    names = [name for name in NAMES if not (by_id and name == "dX")]
    for name, a in zip(names, found, strict=True):
        lost = baseline.get(name)
        assert_close(f"{kernel} {name}", a, truth[name], length=case.length, baseline=lost)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("activation", ["tanh", LEAKY], ids=str)
@each_dtype
@each_kernel
def test_checkpoints(gpu: GPU, kernel: str, dtype: Any, activation: Any, k: int) -> None:
    drawn = draw(PRIME, dtype=dtype)
    for by_id in (False, True) if kernel != "concatenated" else (False,):
        assert_from_checkpoints(gpu, PRIME, drawn, activation, kernel, by_id, k)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@each_kernel
def test_checkpoints_of_half_types(gpu: GPU, kernel: str, name: str) -> None:
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype = np.float16 if name == "float16" else dtypes.bfloat16
    drawn = draw(PRIME).astype(dtype)
    truth = reference(drawn, "tanh", np.float64)
    arguments = [gpu.put(a) for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*arguments, kernel=kernel, checkpoint_every=3)
    found = (H, *F.rnn_backward(gpu.put(drawn.dH), residuals))
    u = float(dtypes.finfo(dtype).eps) / 2
    for label, a in zip(NAMES, found, strict=True):
        error = np.abs(gpu.get(a).astype(np.float64) - truth[label]).max()
        assert error <= 4 * PRIME.T**0.5 * u * np.abs(truth[label]).max(), label


@pytest.mark.parametrize("kernel", ["resident", "step"])
def test_states_from_checkpoints_have_the_same_bits(gpu: GPU, kernel: str) -> None:
    """Where X are ids no product stands before the recurrence: dh_0 is that of all states."""
    case = Case("again", T=33, n=37, d=19, h=131)
    drawn = draw(case, dtype=np.float32)
    arguments, dH = [gpu.put(a) for a in drawn.arguments(by_id=True)], gpu.put(drawn.dH)
    whole = F.rnn_backward(dH, F.rnn_forward(*arguments, kernel=kernel)[1])
    for k in (1, 5, 11, 32):
        _, residuals = F.rnn_forward(*arguments, kernel=kernel, checkpoint_every=k)
        dh_0 = F.rnn_backward(dH, residuals)[1]
        assert np.array_equal(gpu.get(dh_0), gpu.get(whole[1])), k


def test_checkpoints_of_a_book(gpu: GPU) -> None:
    """200,000 steps of one row: little is held once H is gone, and the gradients are right."""
    case, k = Case("book", T=200_000, n=1, d=28, h=128), 1000
    drawn = draw(case, dtype=np.float32)
    arguments, dH = [gpu.put(a) for a in drawn.arguments(by_id=True)], gpu.put(drawn.dH)
    whole = [gpu.get(a) for a in F.rnn_backward(dH, F.rnn_forward(*arguments)[1])[1:]]
    pool = gpu.cp.get_default_memory_pool()
    before = pool.used_bytes()
    residuals = F.rnn_forward(*arguments, checkpoint_every=k)[1]
    state = case.n * case.h * 4
    assert pool.used_bytes() - before < 2 * case.T // k * state
    found = [gpu.get(a) for a in F.rnn_backward(dH, residuals)[1:]]
    truth = reference(drawn, "tanh", np.float64, by_id=True)
    for name, a, b in zip(NAMES[2:], found, whole, strict=True):
        assert_close(name, a, truth[name], length=case.length, baseline=b)


LARGE = [
    ("step", Case("wide", T=48, n=9, d=31, h=1024)),
    ("step", Case("many-rows", T=5, n=1031, d=3, h=257)),
    ("concatenated", Case("wide-concatenated", T=9, n=33, d=129, h=513)),
    ("gemm", Case("wide-products", T=48, n=9, d=31, h=1024)),
    ("gemm", Case("wider-products", T=9, n=3, d=5, h=2048)),
    ("gemm", Case("many-rows-of-products", T=5, n=1031, d=3, h=257)),
    ("gemm", Case("long-products", T=1000, n=2, d=3, h=33)),
    (None, Case("planned-products", T=35, n=16, d=28, h=600)),
    ("resident", Case("long", T=4096, n=3, d=4, h=32)),
    ("resident", Case("more-rows-than-blocks", T=7, n=2111, d=5, h=67)),
    (None, Case("planned", T=64, n=32, d=28, h=256)),
]


@pytest.mark.parametrize(("kernel", "case"), LARGE, ids=str)
def test_large(gpu: GPU, kernel: str | None, case: Case) -> None:
    assert_as_reference(gpu, case, draw(case, dtype=np.float32), kernel=kernel)


@each_dtype
def test_largest_resident(gpu: GPU, dtype: Any) -> None:
    limits = limits_of(gpu.cp.cuda.Device().id)
    name = np.dtype(dtype).name
    h = planning.largest_resident(name, limits)
    for n in (1, 3, 700):
        case = Case("largest", T=11, n=n, d=5, h=h)
        assert_as_reference(gpu, case, draw(case, dtype=dtype), kernel="resident")
    with pytest.raises(ValueError, match=f"up to h = {h}; expected a smaller h"):
        planning.plan(T=1, n=1, d=1, h=h + 1, dtype=name, device=limits, kernel="resident")


@pytest.mark.parametrize("kernel", ["resident", "step", "gemm"])
def test_more_elements_than_32_bits_count(gpu: GPU, kernel: str) -> None:
    """H has over 2³¹ elements: its first and last steps, and the gradients there, are right."""
    T, n, d, h, last = 16_500, 1024, 1, 128, 4
    assert T * n * h > 2**31
    needed = 4 * 2 * T * n * h  # states, dH, their gradients; and room
    if gpu.free() < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free memory on the GPU")
    cp = gpu.cp
    drawn = draw(Case("first", T=last, n=n, d=d, h=h)).astype(np.float16)
    tail = draw(Case("last", T=last, n=n, d=d, h=h), seed=1).astype(np.float16)
    X, dH = cp.zeros((T, n, d), np.float16), cp.zeros((T, n, h), np.float16)
    X[:last], X[-last:], dH[-last:] = (gpu.put(a) for a in (drawn.X, tail.X, tail.dH))
    weights = [gpu.put(a) for a in (drawn.W_xh, drawn.W_hh, drawn.b_h)]
    H, residuals = F.rnn_forward(X, gpu.put(drawn.h_0), *weights, kernel=kernel)
    before = gpu.get(H[-last - 1])
    ends = {"first": (drawn.X, drawn.h_0, H[:last]), "last": (tail.X, before, H[-last:])}
    own = [a.astype(np.float64) for a in (drawn.W_xh, drawn.W_hh, drawn.b_h)]
    for name, (x, h_0, found) in ends.items():
        exact, kept = F.rnn_forward(x.astype(np.float64), h_0.astype(np.float64), *own)
        assert np.abs(gpu.get(found) - exact).max() < 1e-2, name
    dX = F.rnn_backward(dH, residuals)[0]
    exact_dX = F.rnn_backward(tail.dH.astype(np.float64), kept)[0]
    assert exact_dX is not None
    scale = np.abs(exact_dX).max()
    assert np.abs(gpu.get(dX)[-last:] - exact_dX).max() < 1e-2 * scale


@each_kernel
def test_same_bits_every_time(gpu: GPU, kernel: str) -> None:
    case = Case("again", T=33, n=37, d=19, h=131)
    drawn = draw(case, dtype=np.float32)
    first, *others = (results(gpu, drawn, "tanh", kernel) for _ in range(3))
    for other in others:
        for name, a in other.items():
            assert_same_bits(name, a, first[name])


@pytest.mark.parametrize("kernel", ["resident", "step", "gemm"])
def test_rows_know_nothing_of_each_other(gpu: GPU, kernel: str) -> None:
    """The other rows' contents change no bit of a row's states and of its own gradients."""
    case = Case("rows", T=9, n=23, d=7, h=65)
    drawn, other = draw(case, dtype=np.float32), draw(case, seed=1, dtype=np.float32)
    kept = [0, 8, 22]
    for name in ("X", "h_0", "dH"):
        mixed, mine = getattr(other, name), getattr(drawn, name)
        mixed[..., kept, :] = mine[..., kept, :]
    for name in ("W_xh", "W_hh", "b_h"):
        getattr(other, name)[...] = getattr(drawn, name)
    a, b = (results(gpu, d, "tanh", kernel) for d in (drawn, other))
    for name in ("H", "dX", "dh_0"):
        assert_same_bits(name, a[name][..., kept, :], b[name][..., kept, :])


class Interface:
    """An array of a library that speaks ``__cuda_array_interface__`` alone."""

    def __init__(self, a: Any) -> None:
        self.kept = a
        self.__cuda_array_interface__ = a.__cuda_array_interface__


def test_cuda_array_interface_without_a_copy(gpu: GPU) -> None:
    a = gpu.put(np.ones((3, 4), np.float32))
    engine, found = arrays.taken({"a": Interface(a)})
    assert found["a"].data.ptr == a.data.ptr  # type: ignore[union-attr]
    assert engine.index == a.device.id
    drawn = draw(PRIME, dtype=np.float32)
    arguments = [gpu.put(a) for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*(Interface(a) for a in arguments))  # type: ignore[arg-type]
    assert residuals.X.data.ptr == arguments[0].data.ptr  # type: ignore[attr-defined]
    assert_same_bits("H", gpu.get(H), gpu.get(F.rnn_forward(*arguments)[0]))


def test_torch_tensors_without_a_copy(gpu: GPU) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its import: not what is tested
        torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch is installed without CUDA")
    drawn = draw(PRIME, dtype=np.float32)
    tensors = [torch.as_tensor(a).cuda() for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*tensors)
    for name in ("X", "W_xh", "W_hh"):
        tensor = tensors[{"X": 0, "W_xh": 2, "W_hh": 3}[name]]
        assert getattr(residuals, name).data.ptr == tensor.data_ptr(), name
    assert isinstance(H, gpu.cp.ndarray)
    assert torch.from_dlpack(H).data_ptr() == H.data.ptr  # and back
    with pytest.raises(TypeError, match=r"X is a torch\.Tensor that does not hand out its memory"):
        F.rnn_forward(tensors[0].requires_grad_(), *tensors[1:])


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long begun = clock64();
    while (clock64() - begun < cycles) {}
}
"""


@pytest.mark.parametrize("kernel", ["resident", "step", "gemm"])
def test_current_stream(gpu: GPU, kernel: str) -> None:
    """What is queued before on the current stream is done before: h_0 is written behind a delay."""
    cp = gpu.cp
    drawn = draw(PRIME, dtype=np.float32)
    X, h_0, *weights = (gpu.put(a) for a in drawn.arguments())
    right, _ = F.rnn_forward(X, h_0, *weights, kernel=kernel)
    spin = cp.RawKernel(SPIN, "spin")
    spin((1,), (1,), (np.int64(1),))  # compiled before it matters
    late = cp.full_like(h_0, 7)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        spin((1,), (1,), (np.int64(200_000_000),))  # about 0.1 s
        cp.copyto(late, h_0)
        H, _ = F.rnn_forward(X, late, *weights, kernel=kernel)
        stream.synchronize()
    assert_same_bits("H", gpu.get(H), gpu.get(right))


def test_graphs_serve_other_arrays_and_other_lengths(gpu: GPU) -> None:
    for seed, T in enumerate((5, 71, 33, 4, 5)):
        case = Case("again", T=T, n=9, d=7, h=300)
        assert_as_reference(gpu, case, draw(case, seed=seed, dtype=np.float32), kernel="gemm")


def test_nan_of_one_call_does_not_reach_the_next(gpu: GPU) -> None:
    case = Case("spoilt", T=37, n=9, d=7, h=65)
    drawn = draw(case, dtype=np.float32)
    spoilt = [gpu.put(np.full_like(a, np.nan)) for a in drawn.arguments() if a is not None]
    H, residuals = F.rnn_forward(*spoilt, kernel="gemm")
    F.rnn_backward(H, residuals)
    assert bool(gpu.cp.isnan(H).all())
    assert_as_reference(gpu, case, drawn, kernel="gemm")


def test_more_shapes_than_graphs_are_kept(gpu: GPU) -> None:
    for n in (*range(1, graphs.MOST_GRAPHS + 2), 1, 2):
        case = Case("many", T=5, n=n, d=3, h=33)
        assert_as_reference(gpu, case, draw(case, dtype=np.float32), kernel="gemm")


def test_two_streams_with_one_graph(gpu: GPU) -> None:
    """The second is queued while the first still waits in its stream: neither spoils the other."""
    cp = gpu.cp
    case = Case("turns", T=37, n=9, d=7, h=65)
    passes = [
        [gpu.put(a) for a in draw(case, seed=i, dtype=np.float32).arguments()] for i in (0, 1)
    ]
    right = [gpu.get(F.rnn_forward(*arguments, kernel="gemm")[0]) for arguments in passes]
    spin = cp.RawKernel(SPIN, "spin")
    spin((1,), (1,), (np.int64(1),))
    cp.cuda.Device().synchronize()
    found = []
    for cycles, arguments in zip((200_000_000, 1), passes, strict=True):
        with cp.cuda.Stream(non_blocking=True) as stream:
            spin((1,), (1,), (np.int64(cycles),))
            found.append((F.rnn_forward(*arguments, kernel="gemm")[0], stream))
    for (H, stream), expected in zip(found, right, strict=True):
        stream.synchronize()
        assert_same_bits("H", gpu.get(H), expected)


@each_kernel
def test_within_a_capture_of_the_caller(gpu: GPU, kernel: str) -> None:
    """A pass is captured whole and replayed with other numbers in the same arrays."""
    cp = gpu.cp
    case = Case("captured", T=37, n=9, d=7, h=65)
    first, other = (draw(case, seed=seed, dtype=np.float32) for seed in (0, 1))
    arguments, dH = [gpu.put(a) for a in first.arguments()], gpu.put(first.dH)

    def run() -> list[Any]:
        H, residuals = F.rnn_forward(*arguments, kernel=kernel)
        return [H, *F.rnn_backward(dH, residuals)]

    run()  # compiled and loaded
    pool = cp.cuda.MemoryPool()  # the graph's, whose memory nothing else gets
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        found = run()
        graph = stream.end_capture()
    for drawn in (first, other):
        for a, b in zip((*arguments, dH), (*drawn.arguments(), drawn.dH), strict=True):
            a.set(b)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        truth = reference(drawn, "tanh", np.float64)
        lost = reference(drawn, "tanh", np.float32)
        for name, a in zip(NAMES, found, strict=True):
            assert_close(name, gpu.get(a), truth[name], length=case.length, baseline=lost[name])


PRODUCTS = [(1, 1, 1), (1, 300, 257), (33, 1, 5), (129, 65, 1), (64, 512, 512)]


@pytest.mark.parametrize("written", ["own", "float32"])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_by_cublas(gpu: GPU, shape: tuple[int, int, int], name: str, written: str) -> None:
    """Small integers, which every type has and sums exactly, and transposes of the factors."""
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    if written == "float32" and name in ("float32", "float64"):
        pytest.skip("this dtype writes its own")
    dtype = np.dtype(dtypes.bfloat16 if name == "bfloat16" else name)
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.integers(-1, 2, (m, k)), rng.integers(-1, 2, (k, n))
    into = dtype if written == "own" else np.dtype(np.float32)
    engine = GPUEngine(gpu.cp.cuda.Device().id)
    for A in (gpu.put(a.astype(dtype)), gpu.put(np.ascontiguousarray(a.T).astype(dtype)).T):
        for B in (gpu.put(b.astype(dtype)), gpu.put(np.ascontiguousarray(b.T).astype(dtype)).T):
            out = gpu.put(np.full((m, n), np.nan, into))
            engine.step_product(A, B, out, engine.workspace())
            assert_same_bits("product", gpu.get(out), (a @ b).astype(into))


def test_numpy_among_them_is_refused(gpu: GPU) -> None:
    X, *others = draw(PRIME, dtype=np.float32).arguments()
    with pytest.raises(TypeError, match=r"X is a numpy\.ndarray but h_0 is a cupy\.ndarray"):
        F.rnn_forward(X, *(gpu.put(a) for a in others))  # type: ignore[arg-type]


def test_kernel_that_cannot_hold_h_is_refused(gpu: GPU) -> None:
    drawn = draw(Case("too-wide", T=1, n=1, d=1, h=600), dtype=np.float32)
    with pytest.raises(ValueError, match="kernel is 'resident', h is 600"):
        F.rnn_forward(*(gpu.put(a) for a in drawn.arguments()), kernel="resident")


@pytest.fixture
def second(gpu: GPU) -> Any:
    count = gpu.cp.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip(f"needs two GPUs, there is {count}")
    return gpu.cp.cuda.Device(1)


def test_runs_where_the_arrays_lie(gpu: GPU, second: Any) -> None:
    """Not on the current device."""
    drawn = draw(PRIME, dtype=np.float32)
    with second:
        there = [gpu.put(a) for a in drawn.arguments()]
        dH = gpu.put(drawn.dH)
    H, residuals = F.rnn_forward(*there)
    found = [a for a in (H, *F.rnn_backward(dH, residuals)) if a is not None]
    assert {a.device.id for a in found} == {1}  # type: ignore[union-attr]
    here, _ = F.rnn_forward(*(gpu.put(a) for a in drawn.arguments()))
    assert_same_bits("H", gpu.get(H), gpu.get(here))


def test_arrays_on_two_devices_are_refused(gpu: GPU, second: Any) -> None:
    X, *others = (gpu.put(a) for a in draw(PRIME, dtype=np.float32).arguments())
    with second:
        X = gpu.put(gpu.get(X))
    with pytest.raises(ValueError, match="h_0 is on CUDA device 0 but X on 1"):
        F.rnn_forward(X, *others)
