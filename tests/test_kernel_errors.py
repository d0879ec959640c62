"""What the kernels' path refuses, by exact message, before anything has run."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case, draw
from kernel_setup import Array

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.cuda.engines import EmulatedEngine

ODD = next(case for case in SMALL if case.name == "odd")


@pytest.fixture
def arguments() -> list[Any]:
    return list(draw(ODD, dtype=np.float32).arguments())


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(EmulatedEngine, "launch", launch)


def refuses(
    error: type[Exception], message: str, function: Any, *arguments: Any, **keys: Any
) -> None:
    with pytest.raises(error) as caught:
        function(*arguments, **keys)
    assert str(caught.value) == message


@pytest.mark.parametrize("kernel", planning.KERNELS)
def test_a_kernel_without_a_gpu(arguments: list[Any], kernel: str) -> None:
    refuses(
        ValueError,
        f"kernel is {kernel!r} but X is a numpy.ndarray: kernels take arrays on a GPU, or NumPy's "
        "within gpurnn.emulated()",
        F.rnn_forward,
        *arguments,
        kernel=kernel,
    )


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("kernel", ["Group", "Resident", ""])
def test_a_kernel_there_is_not(arguments: list[Any], kernel: str, emulated: bool) -> None:
    message = f"kernel is {kernel!r}: expected one of step, resident, group, concatenated, gemm"
    if emulated:
        with gpurnn.emulated():
            refuses(ValueError, message, F.rnn_forward, *arguments, kernel=kernel)
    else:
        refuses(ValueError, message, F.rnn_forward, *arguments, kernel=kernel)


@pytest.mark.parametrize(
    ("dtype", "device", "largest"),
    [
        ("float32", "H100", 256),
        ("float64", "H100", 192),
        ("float64", "A100", 160),
        ("float16", "A100", 256),
    ],
)
def test_more_hidden_units_than_a_block_can_hold(dtype: str, device: str, largest: int) -> None:
    name = planning.DEVICES[device].name
    beyond = "gemm" if dtype == "float64" else "group"
    case = Case("", T=1, n=1, d=1, h=largest + 1)
    with gpurnn.emulated(device):
        refuses(
            ValueError,
            f"kernel is 'resident', h is {largest + 1}, dtype {dtype}: one block of {name} holds "
            f"W_hh up to h = {largest}; expected a smaller h, or kernel 'group' or 'gemm'",
            F.rnn_forward,
            *draw(case).astype(dtype).arguments(),
            kernel="resident",
        )
        assert gpurnn.plan(T=1, n=1, d=1, h=largest, dtype=dtype).kernel == "resident"
        assert gpurnn.plan(T=1, n=1, d=1, h=largest + 1, dtype=dtype).kernel == beyond


def test_ids_for_a_kernel_that_takes_floats() -> None:
    arguments = draw(ODD, dtype=np.float32).arguments(by_id=True)
    with gpurnn.emulated():
        refuses(
            ValueError,
            "kernel is 'concatenated' but X holds ids: expected (T, n, d) floats",
            F.rnn_forward,
            *arguments,
            kernel="concatenated",
        )


def test_a_fast_activation_in_double_precision() -> None:
    drawn = draw(ODD)
    with gpurnn.emulated():
        for name, function, given in (
            ("W_hh", F.rnn_forward, drawn.arguments()),
            ("W_xh", F.hidden_layer, (drawn.X, drawn.W_xh, drawn.b_h)),
        ):
            refuses(
                ValueError,
                f"activation is 'fast_tanh' and {name} has dtype float64: kernels have it for "
                "float32, float16 and bfloat16; expected one of these, or 'tanh'",
                function,
                *given,
                activation="fast_tanh",
            )


@pytest.mark.parametrize("bad", [np.complex64, np.int32, np.longdouble])
def test_a_dtype_no_kernel_has(arguments: list[Any], bad: type) -> None:
    arguments[3] = arguments[3].astype(bad)
    with gpurnn.emulated():
        refuses(
            TypeError,
            f"W_hh has dtype {np.dtype(bad)}: expected float32, float64, float16 or bfloat16",
            F.rnn_forward,
            *arguments,
        )


def test_two_dtypes(arguments: list[Any]) -> None:
    arguments[0] = arguments[0].astype(np.float16)
    with gpurnn.emulated():
        refuses(
            TypeError,
            "X has dtype float16 but W_hh has float32: expected one dtype for all",
            F.rnn_forward,
            *arguments,
        )


def test_half_precision_on_numpy(arguments: list[Any]) -> None:
    refuses(
        TypeError,
        "W_hh has dtype float16: expected float32 or float64",
        F.rnn_forward,
        *(a.astype(np.float16) for a in arguments),
    )


@pytest.mark.parametrize("device", ["h100", "", None, 0])
def test_a_device_to_plan_for(device: Any) -> None:
    def enter() -> None:
        with gpurnn.emulated(device):
            pass

    message = f"device is {device!r}: expected one of A100, H100, H200, or a planning.Limits"
    refuses(ValueError, message, enter)


def test_a_gradient_of_another_shape(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with gpurnn.emulated():
        H, residuals = F.rnn_forward(*arguments)
    refuses(
        ValueError,
        f"dH has shape (4, 3, 9): expected H's shape = {H.shape}",
        F.rnn_backward,
        H[1:].copy(),
        residuals,
    )


def test_arguments_that_may_not_be_written_are_not(
    arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()

    def frozen(a: Array) -> Array:
        a.flags.writeable = False
        return a

    with gpurnn.emulated():
        H, residuals = F.rnn_forward(*map(frozen, arguments))
        F.rnn_backward(frozen(np.ones_like(H)), residuals)


def test_emulation_ends_with_its_context(arguments: list[Any]) -> None:
    try:
        with gpurnn.emulated():
            raise KeyError
    except KeyError:
        pass
    F.rnn_forward(*arguments)  # by NumPy: no kernel is launched


@pytest.mark.parametrize("missing", ["greenlet", "numba"])
def test_without_what_the_emulator_needs(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import numpy as np, gpurnn\n"
        "from gpurnn import functional as F\n"
        "a = np.ones((1, 1, 1)); w = np.ones((1, 1))\n"
        "with gpurnn.emulated(): F.rnn_forward(a, None, w, w, None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'gpurnn[emulator]'" in done.stderr.splitlines()[-1]
