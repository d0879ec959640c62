"""Everything a kernel refers to is replaced for it, and for nobody else."""

import collections
import importlib.util
import math
from math import tanh

import numba
import numpy as np
import pytest
import twins
from numba import cuda, float32
from numba.cuda import atomic, blockDim, blockIdx, laneid, libdevice, syncthreads, threadIdx
from numba.cuda.extending import intrinsic
from numba.cuda.libdevice import fast_expf

from gpurnn import emulator
from gpurnn.emulator import UnsupportedError

Pair = collections.namedtuple("Pair", "forward backward")


@cuda.jit(device=True)
def square(x):
    return x * x


def plain(x):
    return square(x) + float32(1)


def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)


def make(pair, functions, module):
    scale = 2.0

    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        inner = [square(x[i] + k) for k in range(2)]
        out[0, i] = pair.forward(x[i])
        out[1, i] = functions[1](x[i])
        out[2, i] = scale * inner[1]
        out[3, i] = factorial(4) + module.square(x[i])

    return kernel


def test_device_functions_wherever_they_are():
    import test_emulator_rebinding as module

    kernel = make(Pair(plain, square), [plain, square], module)
    x, out = np.arange(4, dtype=np.float32), np.zeros((4, 4))
    emulator.launch(kernel, 2, 2, (x, out))
    assert (out == [x * x + 1, x * x, 2 * (x + 1) ** 2, 24 + x * x]).all()


@cuda.jit
def names_by_themselves(x):
    i = threadIdx.x + blockIdx.x * blockDim.x
    syncthreads()
    atomic.add(x, i, tanh(x[i]) + fast_expf(float32(0)))


def test_names_imported_by_themselves():
    x = np.array([0, 1, 2, 3], np.float32)
    expected = x + np.tanh(x) + 1
    emulator.launch(names_by_themselves, 2, 2, (x,))
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_originals_are_untouched():
    before = dict(plain.__globals__), plain.__code__, square.py_func.__code__
    emulator.launch(names_by_themselves, 1, 1, (np.zeros(1, np.float32),))
    assert before == (dict(plain.__globals__), plain.__code__, square.py_func.__code__)
    assert names_by_themselves.py_func.__globals__["threadIdx"] is cuda.threadIdx
    assert math.tanh is tanh and cuda.syncthreads is syncthreads
    with pytest.raises(NotImplementedError):
        cuda.shared.array(1, float32)


def test_two_kernels_from_one_factory_have_their_own_shared_memory():
    def make(value):
        @cuda.jit(device=True)
        def put():
            s = cuda.shared.array(1, numba.int32)
            s[0] = value
            return s

        return put

    one, two = make(1), make(2)

    def kernel(out):
        a, b = one(), two()
        out[0] = a[0] * 10 + b[0]

    out = np.zeros(1)
    emulator.launch(kernel, 1, 1, (out,))
    assert out[0] == 12


@intrinsic
def without_twin(typingctx, x):
    raise AssertionError("only a compiler calls this")


@intrinsic
def with_twin(typingctx, x):
    raise AssertionError("only a compiler calls this")


with_twin.emulated = lambda cuda, x: x + 100 * cuda.threadIdx.x


def test_intrinsics():
    def right(out):
        out[cuda.threadIdx.x] = with_twin(5)

    def wrong(out):
        out[0] = without_twin(5)

    out = np.zeros(3)
    emulator.launch(right, 1, 3, (out,))
    assert out.tolist() == [5, 105, 205]
    with pytest.raises(
        UnsupportedError, match=r"without_twin has no emulation.*'emulated'"
    ) as info:
        emulator.launch(wrong, 1, 1, (out,))
    place = info.value.places[0]
    assert place.function == "wrong" and f"{place.file}:{place.line}" in str(info.value)


def test_unknown_names():
    for function, name in [
        (lambda: cuda.nothing(), "cuda.nothing"),
        (lambda: cuda.device_array(3), "cuda.device_array"),
        (lambda: libdevice.jn(1, 2.0), "libdevice.jn"),
        (lambda: math.comb(1, 2), "math.comb"),
        (lambda: laneid + 1, "laneid"),
    ]:
        with pytest.raises(UnsupportedError, match=name.replace(".", r"\.")) as info:
            emulator.launch(function, 1, 1, ())
        assert info.value.places[0].thread == (0, 0, 0)


def test_a_dispatcher_and_its_function_are_the_same():
    for kernel in (names_by_themselves, names_by_themselves.py_func):
        x = np.zeros(1, np.float32)
        emulator.launch(kernel, 1, 1, (x,))
        assert x[0] == 1


def test_default_arguments():
    def kernel(out, scale=2.5):
        out[0] = scale

    out = np.zeros(1)
    emulator.launch(kernel, 1, 1, (out,))
    assert out[0] == 2.5
    emulator.launch(kernel, 1, 1, (out, 3))
    assert out[0] == 3


def test_exchange_lets_a_twin_use_the_whole_warp():
    total = twins.Twin(lambda cuda, x: sum(cuda.emu.exchange(x).values()))

    def kernel(out):
        out[cuda.laneid] = total(cuda.laneid)

    out = np.zeros(32)
    emulator.launch(kernel, 1, 32, (out,))
    assert (out == 496).all()


def test_acquire_and_release():
    load = twins.Twin(lambda cuda, a, i: cuda.emu.strong_load(a, i, acquire=True))
    store = twins.Twin(lambda cuda, a, i, v: cuda.emu.strong_store(a, i, v, release=True))
    relaxed = twins.Twin(lambda cuda, a, i, v: cuda.emu.strong_store(a, i, v))

    def make(store):
        def kernel(data, flag, out):
            if cuda.grid(1) == 0:
                data[0] = 3
                store(flag, 0, 1)
            else:
                while load(flag, 0) == 0:
                    pass
                out[0] = data[0]

        return kernel

    out = np.zeros(1)
    emulator.launch(make(store), 2, 1, (np.zeros(1), np.zeros(1, np.int32), out))
    assert out[0] == 3
    with pytest.raises(emulator.RaceError):
        emulator.launch(make(relaxed), 2, 1, (np.zeros(1), np.zeros(1, np.int32), out))


NAMED_LIKE_THE_STANDARD_LIBRARY = """
from numba import cuda

def first():
    return cuda.grid(1)

@cuda.jit(device=True)
def second():
    return first() + 1

@cuda.jit
def kernel(out):
    out[cuda.grid(1)] = first() + second()
"""


@pytest.mark.parametrize("name", ["profile", "queue"])
def test_a_module_named_like_one_of_the_standard_library(name, tmp_path):
    path = tmp_path / f"{name}.py"
    path.write_text(NAMED_LIKE_THE_STANDARD_LIBRARY, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = np.zeros(4)
    emulator.launch(module.kernel, 2, 2, (out,))
    assert out.tolist() == [1, 3, 5, 7]
