"""What the host does for a GPU, without one: CuPy is a stand-in and the kernels are emulated."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
from cases import SMALL, draw
from kernel_setup import KERNELS, NAMES, Array
from tolerance import assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.cuda import engines
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import Group

ODD = next(case for case in SMALL if case.name == "odd")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.FakeCuPy]:
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()


def run(arguments: Any, dH: Any, kernel: str | None = None, xi: Any = None) -> dict[str, Any]:
    H, residuals = F.rnn_forward(*arguments, kernel=kernel)
    found = (H, *F.rnn_backward(dH, residuals, xi=xi))
    return {name: a for name, a in zip(NAMES, found, strict=True) if a is not None}


HALVES = (np.float16, ml_dtypes.bfloat16)
RUNS = [
    pytest.param(
        kernel, by_id, dtype, id=f"{kernel}-{'ids' if by_id else 'floats'}-{dtype.__name__}"
    )
    for kernel in KERNELS
    for by_id in (False, True)
    for dtype in (np.float32, np.float64, *HALVES)
    if not (by_id and kernel == "concatenated")  # takes floats
    and (by_id or dtype not in HALVES)  # NumPy's own products of halves are not CuPy's
]


@pytest.mark.parametrize("xi", [None, [2, 0, 1, 0.5, 1.5]], ids=["full", "truncated"])
@pytest.mark.parametrize(("kernel", "by_id", "dtype"), RUNS)
def test_the_same_bits_as_under_the_emulator(
    cupy: fake_cupy.FakeCuPy, kernel: str, by_id: bool, xi: list[float] | None, dtype: Any
) -> None:
    """So the packed arguments, and all that is different for CuPy, are right."""
    drawn = draw(ODD).astype(dtype)
    factors = None if xi is None else np.array(xi, dtype)
    with gpurnn.emulated():
        expected = run(drawn.arguments(by_id=by_id), drawn.dH, kernel, factors)
    found = run(
        [cupy.new(a) for a in drawn.arguments(by_id=by_id)],
        cupy.new(drawn.dH),
        kernel,
        None if factors is None else cupy.new(factors),
    )
    assert found.keys() == expected.keys()
    exact = ("H", "dh_0") if dtype in HALVES else NAMES
    for name, a in found.items():
        assert isinstance(a, fake_cupy.Array)
        if name in exact:
            assert_same_bits(name, a.view(np.ndarray), expected[name])


@pytest.mark.parametrize(
    ("kernel", "by_id"), [("resident", False), ("resident", True), ("concatenated", False)]
)
@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
def test_checkpoints_on_a_device_that_is_not_the_current_one(
    cupy: fake_cupy.FakeCuPy, kernel: str, by_id: bool, dtype: Any
) -> None:
    drawn = draw(ODD).astype(dtype)
    xi = np.array([2, 0, 1, 0.5, 1.5], dtype)
    with cupy.cuda.Device(3):
        arguments = [cupy.new(a) for a in drawn.arguments(by_id=by_id)]
        dH, factors = cupy.new(drawn.dH), cupy.new(xi)
    H, residuals = F.rnn_forward(*arguments, kernel=kernel, checkpoint_every=2)
    assert residuals.states.shape == (3, ODD.n, ODD.h)
    assert not np.shares_memory(residuals.states, H)
    found = [a for a in F.rnn_backward(dH, residuals, xi=factors) if a is not None]
    assert {a.device.id for a in (H, residuals.states, *found)} == {3}
    assert len(cupy.launches) == (3 if kernel == "resident" else ODD.T) * 2 + (
        1 if kernel == "resident" else ODD.T + 3
    ) + (6 if by_id else 3)
    if dtype in HALVES:  # NumPy's own products of halves are not CuPy's
        return
    with gpurnn.emulated():
        kept = F.rnn_forward(*drawn.arguments(by_id=by_id), kernel=kernel, checkpoint_every=2)[1]
        expected = [a for a in F.rnn_backward(drawn.dH, kept, xi=xi) if a is not None]
    for a, b in zip(found, expected, strict=True):
        assert_same_bits("gradient", a.view(np.ndarray), b)


def test_layers_without_a_state(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)

    def both(new: Any) -> list[Any]:
        X, W_xh, b_h, dH = (new(a) for a in (drawn.X, drawn.W_xh, drawn.b_h, drawn.dH))
        H, residuals = F.hidden_layer(X, W_xh, b_h)
        O = F.linear(X, W_xh, b_h)
        layer, output = F.hidden_layer_backward(dH, residuals), F.linear_backward(dH, X, W_xh)
        return [H, O, *layer, *output]

    with gpurnn.emulated():
        expected = both(np.array)
    for a, b in zip(both(cupy.new), expected, strict=True):
        assert_same_bits("layer", a.view(np.ndarray), b)


def test_a_kernel_is_loaded_once_on_each_device(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    for device in (0, 1, 0, 1):
        with cupy.cuda.Device(device):
            arguments = [cupy.new(a) for a in drawn.arguments()]
            dH = cupy.new(drawn.dH)
        run(arguments, dH)
    kinds = [(spec.kind, device) for spec, device in cupy.loads]
    assert sorted(kinds) == sorted(
        (kind, device)
        for kind in ("column_sums", "resident_forward", "resident_backward")
        for device in (0, 1)
    )
    assert len(cupy.launches) == 12


def test_everything_lies_where_the_arguments_lie(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    with cupy.cuda.Device(3):
        arguments = [cupy.new(a) for a in drawn.arguments(bias=False) if a is not None]
        dH = cupy.new(drawn.dH)
    found = run([*arguments, None], dH)
    assert {a.device.id for a in found.values()} == {3}
    assert {device for _, device in cupy.launches} == {3}
    assert cupy.cuda.Device().id == 0, "the current device is the caller's"


def test_arguments_that_must_be_copied_are_copied_where_they_lie(
    cupy: fake_cupy.FakeCuPy,
) -> None:
    """Though another device is the current one: ids of another type, weights transposed."""
    drawn = draw(ODD, dtype=np.float32)
    with cupy.cuda.Device(3):
        ids, dH = cupy.new(drawn.ids.astype(np.uint8)), cupy.new(drawn.dH.transpose(1, 0, 2))
        dH = dH.transpose(1, 0, 2)
        h_0, W_xh, b_h = (cupy.new(a) for a in (drawn.h_0, drawn.W_xh, drawn.b_h))
        W_hh = cupy.new(drawn.W_hh.T).T
    with gpurnn.emulated():
        expected = run(drawn.arguments(by_id=True), drawn.dH)
    found = run([ids, h_0, W_xh, W_hh, b_h], dH)
    for name, a in found.items():
        assert a.device.id == 3
        assert_same_bits(name, a.view(np.ndarray), expected[name])
    with cupy.cuda.Device(3):
        flat = cupy.new(drawn.X.reshape(-1, ODD.d))
        rows = cupy.new(drawn.dH.reshape(-1, ODD.h))
    H, residuals = F.hidden_layer(flat[::2], W_xh, b_h)
    arrays = [H, *F.hidden_layer_backward(rows[::2], residuals), F.linear(flat[::2], W_xh, b_h)]
    arrays += F.linear_backward(rows[::2], flat[::2], W_xh)
    assert {a.device.id for a in arrays} == {3}


def test_arrays_on_two_devices_are_refused(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    arguments = [cupy.new(a) for a in drawn.arguments()]
    with cupy.cuda.Device(1):
        arguments[3] = cupy.new(drawn.W_hh)
        dH = cupy.new(drawn.dH)
    with pytest.raises(ValueError, match=r"^W_hh is on CUDA device 1 but X on 0: expected all"):
        F.rnn_forward(*arguments)
    arguments[3] = cupy.new(drawn.W_hh)
    _, residuals = F.rnn_forward(*arguments)
    with pytest.raises(ValueError, match=r"^dH is on CUDA device 1 but the forward pass ran on 0"):
        F.rnn_backward(dH, residuals)
    assert len(cupy.launches) == 1


def test_the_gradient_of_states_on_a_gpu_must_be_there_too(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    _, residuals = F.rnn_forward(*(cupy.new(a) for a in drawn.arguments()))
    with pytest.raises(TypeError, match=r"^dH is a numpy.ndarray: expected an array on a GPU, as"):
        F.rnn_backward(drawn.dH, residuals)


class Foreign:
    """An array of another library, on a GPU."""

    def __init__(self, a: Any, error: Exception | None = None) -> None:
        self.a, self.error = a, error

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: object) -> Any:
        if self.error:
            raise self.error
        return self.a


def test_other_libraries_arrays_are_taken_without_a_copy(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    theirs = [cupy.new(a) for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*(Foreign(a) for a in theirs))
    assert residuals.X is theirs[0] and residuals.W_hh is theirs[3]
    with gpurnn.emulated():
        assert_same_bits("H", H.view(np.ndarray), F.rnn_forward(*drawn.arguments())[0])


def test_an_array_its_library_keeps_is_refused(cupy: fake_cupy.FakeCuPy) -> None:
    theirs: list[Any] = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]
    theirs[2] = Foreign(None, BufferError("it requires grad"))
    with pytest.raises(TypeError, match=r"^W_xh is a .*Foreign that does not hand out its memory"):
        F.rnn_forward(*theirs)


def test_an_array_without_memory_is_refused(cupy: fake_cupy.FakeCuPy) -> None:
    theirs: list[Any] = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]

    class Freed(fake_cupy.Array):
        @property
        def data(self) -> Any:
            return type("", (), {"ptr": 0})

    theirs[1] = theirs[1].view(Freed)
    with pytest.raises(ValueError, match=r"^h_0 has no memory behind it: it has been freed"):
        F.rnn_forward(*theirs)
    assert not cupy.launches


def test_an_array_off_its_alignment_is_refused(cupy: fake_cupy.FakeCuPy) -> None:
    theirs: list[Any] = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]
    size = theirs[1].nbytes
    storage = cupy.new(np.zeros(size + 8, np.uint8))
    begin = -storage.ctypes.data % 4 + 1
    theirs[1] = storage[begin : begin + size].view(np.float32).reshape(theirs[1].shape)
    with pytest.raises(
        ValueError, match=r"^h_0 begins at the address \d+: expected a multiple of 4"
    ):
        F.rnn_forward(*theirs)


def test_a_fault_of_the_gpu_is_not_blamed_on_the_array(cupy: fake_cupy.FakeCuPy) -> None:
    theirs: list[Any] = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]
    theirs[2] = Foreign(None, fake_cupy.CUDARuntimeError("cudaErrorNoDevice"))
    with pytest.raises(fake_cupy.CUDARuntimeError, match="cudaErrorNoDevice"):
        F.rnn_forward(*theirs)


def test_an_array_that_cannot_say_where_it_lies(cupy: fake_cupy.FakeCuPy) -> None:
    class Sharded(Foreign):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("sharded over two devices")

    theirs: list[Any] = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]
    theirs[0] = Sharded(theirs[0])
    with pytest.raises(TypeError, match=r"Sharded that does not say where it lies \(sharded over"):
        F.rnn_forward(*theirs)


def test_arrays_that_know_the_older_interface_alone(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        def __init__(self, a: Any) -> None:
            self.a = a
            self.__cuda_array_interface__ = {"version": 3}

    asarray = cupy.asarray
    monkeypatch.setattr(
        cupy, "asarray", lambda a, *rest, **k: asarray(getattr(a, "a", a), *rest, **k)
    )
    theirs = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()]
    _, residuals = F.rnn_forward(*map(Old, theirs))
    assert residuals.X is theirs[0] and residuals.W_hh is theirs[3]


def test_constants_are_settled_before_another_stream_reads_them(
    cupy: fake_cupy.FakeCuPy,
) -> None:
    drawn = draw(ODD, dtype=np.float32)
    arguments = [cupy.new(a) for a in drawn.arguments(bias=False) if a is not None]
    F.rnn_forward(*arguments, None)
    assert cupy.streams == ["wait", "kernel"]
    F.rnn_forward(*arguments, None)
    assert cupy.streams == ["wait", "kernel", "kernel"]


def test_what_the_gpu_is_asked_for(cupy: fake_cupy.FakeCuPy) -> None:
    named = planning.DEVICES["H100"]
    assert engines.limits_of(0) == dataclasses.replace(named, name="a GPU that is none")
    with pytest.raises(ValueError, match=r"^CUDA device 9 cannot be used: cudaErrorInvalidDevice"):
        gpurnn.plan(T=1, n=1, d=1, h=1, device=9)


def test_machine_code_of_another_kernel_is_not_launched(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.compiler, "entry_of", lambda code: "step_forward")
    with pytest.raises(RuntimeError, match="is that of another kernel, step_forward"):
        F.rnn_forward(*(cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments()))


@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_on_a_gpu_are_looked_at(cupy: fake_cupy.FakeCuPy, bad: int) -> None:
    drawn = draw(ODD, dtype=np.float32)
    arguments = [cupy.new(a) for a in drawn.arguments(by_id=True)]
    arguments[0][2, 1] = bad
    with pytest.raises(ValueError, match=rf"^X holds the id {bad} at index \(2, 1\): W_xh has 7"):
        F.rnn_forward(*arguments)


def test_ids_that_are_known_to_be_good_need_no_look(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [cupy.new(a) for a in draw(ODD, dtype=np.float32).arguments(by_id=True)]
    expected, _ = F.rnn_forward(*arguments)

    def waits(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the GPU")

    monkeypatch.setattr(fake_cupy.Array, "min", waits)
    with pytest.raises(AssertionError, match="waits"):
        F.rnn_forward(*arguments)
    H, _ = F.rnn_forward(*arguments, check_ids=False)
    assert_same_bits("H", H.view(np.ndarray), expected.view(np.ndarray))


def test_ids_as_kernels_take_them_are_not_copied(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    _, *rest = (cupy.new(a) for a in drawn.arguments(by_id=True))
    for dtype in (np.int32, np.int64, np.uint16):
        ids = cupy.new(drawn.ids.astype(dtype))
        _, residuals = F.rnn_forward(ids, *rest)
        assert residuals.X.dtype == np.int32
        assert (residuals.X is ids) == (dtype == np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *HALVES])
def test_an_embedding_and_its_gradient(cupy: fake_cupy.FakeCuPy, dtype: Any) -> None:
    drawn = draw(ODD).astype(dtype)
    with gpurnn.emulated():
        X = F.embedding(drawn.ids, drawn.W_xh)
        dE = F.embedding_backward(drawn.dH, drawn.ids, 12)
    with cupy.cuda.Device(3):
        ids, E, dX = (cupy.new(a) for a in (drawn.ids, drawn.W_xh, drawn.dH))
    for check_ids in (True, False):
        found = F.embedding(ids, E, check_ids=check_ids)
        summed = F.embedding_backward(dX, ids, 12, check_ids=check_ids)
        for name, a, b in (("X", found, X), ("dE", summed, dE)):
            assert a.device.id == 3
            assert_same_bits(name, a.view(np.ndarray), b)
    assert {(spec.kind, device) for spec, device in cupy.launches} == {("scatter", 3)}
    with cupy.cuda.Device(3):
        ids[1, 2] = 12
    with pytest.raises(ValueError, match=r"^ids holds the id 12 at index \(1, 2\): E has 7 rows"):
        F.embedding(ids, E)
    with pytest.raises(ValueError, match=r"^ids holds the id 12 at index \(1, 2\): dE has 12 rows"):
        F.embedding_backward(dX, ids, 12)
    with pytest.raises(
        TypeError, match=r"^dX is a .* on a GPU but ids is a numpy.ndarray: expected"
    ):
        F.embedding_backward(dX, drawn.ids, 12)


def test_an_embedding_s_gradient_is_captured(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks at the ids, nothing waits: other ids, of the same shape, give other sums."""
    rng = np.random.default_rng(0)
    ids = cupy.new(rng.integers(0, 3, 600).astype(np.int32))
    dX = cupy.new(rng.standard_normal((600, 2), np.float32))
    for name in ("min", "max"):
        monkeypatch.setattr(fake_cupy.Array, name, None)
    cupy.pool = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        dE = F.embedding_backward(dX, ids, 3, check_ids=False)
        graph = stream.end_capture()
    assert not cupy.launches and len(graph.work) == 2  # parts of the rows, and their sum
    for _ in range(2):
        graph.launch()
        expected = [dX[ids == i].view(np.ndarray).sum(0, dtype=np.float64) for i in range(3)]
        np.testing.assert_allclose(dE.view(np.ndarray), expected, rtol=1e-5, atol=1e-5)
        ids[:] = cupy.array(rng.integers(0, 3, 600))


@pytest.mark.parametrize("kernel", ["resident", "step", Group(2, "flags")], ids=str)
def test_no_rows_are_copied_out_for_ids(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch, kernel: Any
) -> None:
    """The largest that is allocated is what is kept, and the gradients."""
    drawn = draw(ODD, dtype=np.float32)
    arguments, dH = [cupy.new(a) for a in drawn.arguments(by_id=True)], cupy.new(drawn.dH)
    monkeypatch.setattr(cupy, "take", None)
    sizes: list[int] = []
    allocate = cupy._allocate

    def noting(make: Any) -> Any:
        array = allocate(make)
        sizes.append(array.size)
        return array

    cupy._allocate = noting  # type: ignore[method-assign]
    _, residuals = F.rnn_forward(*arguments, kernel=kernel)
    F.rnn_backward(dH, residuals)
    states = (ODD.T + 1) * ODD.n * ODD.h
    assert sizes.count(states) == 2  # and grads
    assert ODD.T * ODD.n * ODD.h not in sizes


def test_what_needs_more_shared_memory_says_so_to_the_driver(cupy: fake_cupy.FakeCuPy) -> None:
    """Only the launch is of interest: its numbers are those of the plan."""
    plan = gpurnn.plan(T=1, n=1, d=1, h=256, device="H100")
    assert plan.shared > 48 * 1024
    spec = KernelSpec("resident_forward", plan.tile, "tanh", "float32")
    function = engines._function(spec, 0, plan.shared, 1)
    assert cupy.allowed == {function.ptr: plan.shared}


@pytest.mark.parametrize("left", range(6))
def test_an_allocation_that_fails_leaves_nothing_behind(
    cupy: fake_cupy.FakeCuPy, left: int
) -> None:
    drawn = draw(ODD, dtype=np.float32)
    arguments, dH = [cupy.new(a) for a in drawn.arguments()], cupy.new(drawn.dH)
    copies = [a.copy() for a in arguments]
    made: list[weakref.ref[Any]] = []
    allocate = cupy._allocate

    def noting(make: Any) -> Any:
        array = allocate(make)
        made.append(weakref.ref(array))
        return array

    cupy._allocate = noting  # type: ignore[method-assign]
    _, residuals = F.rnn_forward(*arguments)
    del made[:]
    cupy.allocations_left = left
    with pytest.raises(MemoryError, match="out of memory"):
        _forward_and_backward(arguments, dH)
    gc.collect()
    assert all(array() is None for array in made)
    cupy.allocations_left = None
    for a, copy in zip(arguments, copies, strict=True):
        assert_same_bits("argument", a.view(np.ndarray), copy.view(np.ndarray))
    F.rnn_backward(dH, residuals)


def _forward_and_backward(arguments: list[Any], dH: Any) -> Array:
    _, residuals = F.rnn_forward(*arguments)
    F.rnn_backward(dH, residuals)
    raise AssertionError("there was memory enough")


def test_a_plan_for_the_gpu_that_is_there(cupy: fake_cupy.FakeCuPy) -> None:
    here = gpurnn.plan(T=10, n=4, d=3, h=64)
    assert here == gpurnn.plan(T=10, n=4, d=3, h=64, device=0)
    assert here == gpurnn.plan(T=10, n=4, d=3, h=64, device="H100")


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    engines.cupy.cache_clear()
    advice = r"need CuPy, and cupy could .*pip install 'gpurnn\[cuda13\]'"
    with pytest.raises(ImportError, match=advice):
        gpurnn.plan(T=1, n=1, d=1, h=1)
