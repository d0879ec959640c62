"""Plans for the device that is there, or one that is named."""

from gpurnn import planning
from gpurnn.cuda.engines import cupy, current_emulation, limits_of

__all__ = ["plan"]


def plan(
    *,
    T: int,
    n: int,
    d: int,
    h: int,
    dtype: str = "float32",
    device: planning.Limits | str | int | None = None,
    kernel: str | planning.Group | None = None,
    precision: str = "ieee",
) -> planning.Plan:
    """Say which kernel ``functional.rnn_forward`` and ``rnn_backward`` would run, and why.

    ::

        print(gpurnn.plan(T=1024, n=32, d=28, h=128, device="H100"))

    Args:
        T: time steps. n: rows of the batch. d: inputs. h: hidden units.
        dtype: "float32", "float64", "float16" or "bfloat16".
        device: a GPU by name ("A100", "H100", "H200": none need be there), by its CUDA index, or a
            ``gpurnn.planning.Limits``; None is the one that would be used now: that of the
            ``emulated()`` around, else CuPy's current device.
        kernel, precision: as in ``rnn_forward``.

    Raises:
        TypeError, ValueError: an argument is out of range, the kernel named cannot hold h, or the
            device meant is not there.
        ImportError: a device that is there is meant, and CuPy is not installed.
    """
    emulation = current_emulation()
    if device is None and emulation is not None:
        limits = emulation.limits
    elif device is None:
        limits = limits_of(_current())
    elif isinstance(device, int) and not isinstance(device, bool):
        limits = limits_of(device)
    else:
        limits = planning.limits("device", device)
    return planning.plan(
        T=T, n=n, d=d, h=h, dtype=dtype, device=limits, kernel=kernel, precision=precision
    )


def _current() -> int:
    """Return the index of CuPy's current device."""
    cuda = cupy().cuda
    try:
        return int(cuda.Device().id)
    except cuda.runtime.CUDARuntimeError as e:
        raise ValueError(
            f"device is None and there is no GPU to plan for ({e}): expected one of "
            f"{', '.join(planning.DEVICES)}, or a planning.Limits"
        ) from e
