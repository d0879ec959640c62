"""The language model on kernels against NumPy: a few updates, and a text it continues."""

import contextvars
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from gpurnn.cuda.engines import emulated
from gpurnn.doctor.device import why_no_gpu
from gpurnn.doctor.findings import Finding, found_by
from gpurnn.text import Corpus
from gpurnn.training import TrainingConfig, prepare
from gpurnn.training.run import Run

__all__ = ["emulated_checks", "gpu_checks"]

Result = TypeVar("Result")

CORPUS = Corpus("a text", "the time machine by h g wells " * 5, "made for this check")
PREFIX = "the "
ADVICE = "do not use it here; report it with the output of gpurnn doctor --json"
SIZES = (("float32", 9), ("float64", 9), ("float32", 300))
"""What a GPU is tried with; from h = 257 on blocks work in groups."""
LIMITS = {"float32": 1e-4, "float64": 1e-10}
"""Relative difference of losses after a few updates: rounding, grown by the updates."""


def emulated_checks() -> Iterator[Finding]:
    """Yield what the emulator has to say of a training step and of a generation."""
    for name, check in (("training", _trained), ("generation", _generated)):

        def under_the_emulator(
            check: Callable[[str, str, str, int], Finding] = check, name: str = name
        ) -> Iterator[Finding]:
            with emulated():
                yield check(f"emulator, {name}", "cpu", "float64", 9)

        yield from found_by(f"emulator, {name}", under_the_emulator)


def gpu_checks() -> Iterator[Finding]:
    """Yield a training run as CUDA graphs, and a generation in one launch, against NumPy."""
    if why_no_gpu() is not None:
        return
    for dtype, hidden_size in SIZES:
        for what, check in (("training", _trained), ("generation", _generated)):
            name = f"GPU, {what}, {dtype}, h {hidden_size}"

            def on_the_gpu(
                check: Callable[[str, str, str, int], Finding] = check,
                name: str = name,
                dtype: str = dtype,
                hidden_size: int = hidden_size,
            ) -> Iterator[Finding]:
                yield check(name, "cuda", dtype, hidden_size)

            yield from found_by(name, on_the_gpu)


def _run(dtype: str, device: str, hidden_size: int) -> Run:
    config = TrainingConfig(
        num_steps=4,
        batch_size=5,
        hidden_size=hidden_size,
        valid_fraction=0.0,
        dropout=0.2,
        epochs=1,
        lr=0.01,
        dtype=dtype,
    )
    return prepare(config, CORPUS, device=device)


def _trained(name: str, device: str, dtype: str, hidden_size: int) -> Finding:
    def losses(device: str) -> list[float]:
        run = _run(dtype, device, hidden_size)
        run.trainer.run()
        record = run.trainer.history[-1]
        return [record["train_loss"], record["largest_gradient_norm"]]

    found, expected = losses(device), _by_reference(lambda: losses("cpu"))
    off = float(np.max(np.abs(np.array(found) / expected - 1)))
    if not off <= LIMITS[dtype]:  # so written, NaN fails
        detail = f"wrong numbers: losses are off by {off:.1e}, at most {LIMITS[dtype]} is right"
        return Finding(name, "failed", detail, ADVICE)
    return Finding(name, "ok", f"losses and gradients as on NumPy, to {off:.0e}")


def _generated(name: str, device: str, dtype: str, hidden_size: int) -> Finding:
    def text(device: str) -> str:
        return _run(dtype, device, hidden_size).model.generate(PREFIX, 12, temperature=0)

    found, expected = text(device), _by_reference(lambda: text("cpu"))
    if found != expected:
        return Finding(name, "failed", f"wrong text: {found!r} instead of {expected!r}", ADVICE)
    return Finding(name, "ok", "the same text as on NumPy")


def _by_reference(compute: Callable[[], Result]) -> Result:
    """Compute outside an ``emulated()`` that may be around."""
    return contextvars.Context().run(compute)
