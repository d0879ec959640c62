"""Scalar types, ``math`` and libdevice: types kept, bits right, nothing raised."""

import math
import warnings
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda, float32, float64, int32, uint8, uint32
from numba.cuda import libdevice

from gpurnn import emulator


def computed(function, *args):
    """Return what ``function`` returns inside a kernel."""
    results = []

    def kernel():
        results_append(function(*args))

    results_append = Sink(results)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emulator.launch(kernel, 1, 1, ())
    return results[0]


class Sink:
    def __init__(self, results):
        self.emulated = lambda cuda, value: results.append(value)


def test_float32_stays_float32():
    x = np.float32(0.1)
    for f in (math.sqrt, math.exp, math.tanh, math.floor, math.fabs, math.log1p):
        y = computed(lambda f=f: f(x))
        assert type(y) is np.float32 and abs(y - np.float32(f(0.1))) <= np.spacing(np.float32(1))
    assert type(computed(lambda: math.tanh(float64(0.1)))) is np.float64
    assert type(computed(lambda: math.tanh(3))) is np.float64
    assert type(computed(lambda: math.pow(x, 2))) is np.float32
    assert type(computed(lambda: math.atan2(x, x))) is np.float32
    assert type(computed(lambda: math.tanh(np.float16(1)))) is np.float32
    assert type(computed(lambda: math.exp(np.float16(1)))) is np.float16


def test_literals_are_float64_as_in_numba():
    x = np.float32(0.1)
    assert type(computed(lambda: x * float32(2.0))) is np.float32
    assert type(computed(lambda: x * 2.0)) is np.float64
    assert type(computed(lambda: float(x))) is np.float32
    assert type(computed(lambda: float(3))) is np.float64
    half = 0.5
    assert type(computed(lambda: x * half)) is np.float64


def test_nothing_raises_where_a_gpu_does_not():
    zero, big = np.float32(0), np.float32(1e30)
    assert computed(lambda: math.exp(float32(1000))) == math.inf
    assert computed(lambda: math.exp(float64(1000))) == math.inf
    assert computed(lambda: math.log(zero)) == -math.inf
    assert math.isnan(computed(lambda: math.log(float32(-1))))
    assert math.isnan(computed(lambda: math.sqrt(float32(-1))))
    assert math.isnan(computed(lambda: math.acos(float32(2))))
    assert math.isnan(computed(lambda: math.sin(float32(math.inf))))
    assert math.isnan(computed(lambda: math.fmod(float32(1), zero)))
    assert computed(lambda: math.pow(big, big)) == math.inf
    assert computed(lambda: math.cosh(float32(-1000))) == math.inf
    assert computed(lambda: math.gamma(float32(1000))) == math.inf
    assert computed(lambda: math.lgamma(float32(0))) == math.inf
    assert computed(lambda: math.floor(float32(math.inf))) == math.inf
    assert computed(lambda: big * big) == math.inf
    assert computed(lambda: float32(1) / zero) == math.inf
    assert computed(lambda: float32(float64(1e300))) == math.inf
    assert math.isnan(computed(lambda: zero / zero))


@pytest.mark.parametrize(
    ("spelled", "value", "result"),
    [
        (numba.int32, 2**31, -(2**31)),
        (numba.uint32, -1, 2**32 - 1),
        (numba.uint8, 300, 44),
        (cuda.int8, 200, -56),
        (np.int64, 2**63, -(2**63)),
        (numba.int32, np.float32(-2.7), -2),
        (numba.int32, np.float64(1e20), 2**31 - 1),
        (numba.int32, np.float32("nan"), 0),
        (int, np.float64(2.9), 2),
        (numba.boolean, 3, True),
    ],
)
def test_casts(spelled, value, result):
    found = computed(lambda: spelled(value))
    assert found == result and type(found) is type(result)


def test_stores_convert():
    def kernel(a, b, c, d):
        a[0] = -1
        a[1] = 2**32 + 5
        a[2] = float64(3.9)
        b[0] = 300
        c[0] = 3
        d[0] = 1e6

    a, b = np.zeros(3, np.uint32), np.zeros(1, np.uint8)
    c, d = np.zeros(1, np.bool), np.zeros(1, np.float16)
    emulator.launch(kernel, 1, 1, (a, b, c, d))
    assert a.tolist() == [2**32 - 1, 5, 3] and b[0] == 44 and c[0] and d[0] == math.inf


def test_arrays_of_integers_give_python_integers():
    x = np.array([200, 100], np.uint8)
    found = computed_with(x, lambda x: x[0] + x[1])
    assert found == 300 and type(found) is int


def computed_with(x, function):
    results = []
    sink = Sink(results)

    def kernel(x):
        sink(function(x))

    emulator.launch(kernel, 1, 1, (x,))
    return results[0]


@given(st.integers(0, 2**32 - 1))
def test_bits_of_float32(bits):
    value = np.uint32(bits).view(np.float32)
    signed = int(np.uint32(bits).view(np.int32))
    assert computed(lambda: libdevice.int_as_float(signed)).tobytes() == value.tobytes()
    assert computed(lambda: libdevice.int_as_float(bits)).tobytes() == value.tobytes()
    assert computed(lambda: libdevice.float_as_int(value)) == signed


@given(st.integers(0, 2**64 - 1))
def test_bits_of_float64(bits):
    value = np.uint64(bits).view(np.float64)
    signed = int(np.uint64(bits).view(np.int64))
    assert computed(lambda: libdevice.longlong_as_double(signed)).tobytes() == value.tobytes()
    assert computed(lambda: libdevice.double_as_longlong(value)) == signed
    assert computed(lambda: libdevice.double2hiint(value)) == signed >> 32
    low = computed(lambda: libdevice.double2loint(value))
    back = computed(lambda: libdevice.hiloint2double(signed >> 32, low))
    assert back.tobytes() == value.tobytes()


singles = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(singles, singles, singles)
def test_fma_rounds_once_in_float32(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = computed(lambda: cuda.fma(float32(a), float32(b), float32(c)))
    assert type(found) is np.float32
    if not np.isfinite(found):
        assert abs(exact) >= Fraction(float(np.finfo(np.float32).max))
        return
    error = abs(Fraction(float(found)) - exact)
    with np.errstate(over="ignore"):
        neighbours = [np.nextafter(found, np.float32(end)) for end in (np.inf, -np.inf)]
    for other in neighbours:
        if np.isfinite(other):
            assert error <= abs(Fraction(float(other)) - exact)


@given(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)
def test_fma_rounds_once_in_float64(a, b, c):
    found = computed(lambda: cuda.fma(float64(a), float64(b), float64(c)))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) < Fraction(1.7e308):
        assert found == float(exact)


def test_libdevice():
    x = np.float32(0.7)
    for name, expected in {
        "fast_expf": np.exp(x),
        "fast_logf": np.log(x),
        "expm1f": np.expm1(x),
        "log1pf": np.log1p(x),
        "tanhf": np.tanh(x),
        "rsqrtf": 1 / np.sqrt(x),
        "erff": np.float32(math.erf(0.7)),
        "cbrtf": np.cbrt(x),
        "saturatef": x,
    }.items():
        found = computed(lambda name=name: getattr(libdevice, name)(x))
        assert type(found) is np.float32 and abs(found - expected) < 2e-7 * abs(expected), name
    assert type(computed(lambda: libdevice.tanh(x))) is np.float64
    assert computed(lambda: libdevice.float2half_rn(x)) == int(np.float16(x).view(np.int16))
    assert computed(lambda: libdevice.umulhi(2**31, 6)) == 3
    assert computed(lambda: libdevice.fmaf(x, x, x)) == np.float32(float(x) * float(x) + float(x))
    assert computed(lambda: libdevice.float2int_rn(2.5)) == 2
    assert computed(lambda: libdevice.float2int_rz(float32(-2.5))) == -2


def test_bit_operations():
    assert computed(lambda: cuda.popc(0b1011)) == 3
    assert computed(lambda: cuda.popc(-1)) == 32
    assert computed(lambda: cuda.clz(1)) == 31
    assert computed(lambda: cuda.clz(1 << 40)) == 23
    assert computed(lambda: cuda.ffs(0b1000)) == 4
    assert computed(lambda: cuda.ffs(0)) == 0
    assert computed(lambda: cuda.brev(uint32(1))) == 1 << 31
    assert computed(lambda: cuda.selp(3 > 2, 1, 2)) == 1
    assert computed(lambda: cuda.cbrt(float32(27))) == 3


def test_local_arrays_convert_too():
    def kernel(out):
        a = cuda.local.array((2, 2), float32)
        b = cuda.local.array(2, uint8)
        c = cuda.local.array(1, int32)
        a[0, 0] = 0.1
        a[1, 1] = 3
        b[0] = 257
        c[0] = float32(7.9)
        out[0] = a[0, 0] == float32(0.1)
        out[1] = a[1][1] * float32(0.1) == float32(3) * float32(0.1)
        out[2] = b[0]
        out[3] = c[0]

    out = np.zeros(4)
    emulator.launch(kernel, 1, 1, (out,))
    assert out.tolist() == [1, 1, 1, 7]
