"""Group kernels, probes and a short soak on a GPU."""

from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case, draw
from gpu_setup import GPU, NAMES, cp, gpu, reference
from tolerance import assert_close, assert_same_bits

from gpurnn import functional as F
from gpurnn import planning, tuned
from gpurnn.bench import measure_probes, run_soak
from gpurnn.cuda.engines import limits_of
from gpurnn.planning import Group

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

PRIME = next(case for case in SMALL if case.name == "prime")
WIDE = Case("wide", T=9, n=5, d=7, h=400)

each_exchange = pytest.mark.parametrize("exchange", planning.EXCHANGES)


def needs(gpu: GPU, exchange: str, blocks: int) -> None:
    limits = limits_of(gpu.cp.cuda.Device().id)
    if exchange == "cluster" and blocks > limits.largest_cluster:
        pytest.skip(f"{limits.name} has no clusters of {blocks}")


def results(gpu: GPU, drawn: Any, kernel: Group) -> dict[str, Any]:
    H, residuals = F.rnn_forward(*(gpu.put(a) for a in drawn.arguments()), kernel=kernel)
    assert residuals.plan is not None and residuals.plan.kernel == "group"
    found = (H, *F.rnn_backward(gpu.put(drawn.dH), residuals))
    return {name: gpu.get(a) for name, a in zip(NAMES, found, strict=True)}


@pytest.mark.parametrize(
    ("case", "blocks"), [(PRIME, 2), (PRIME, 4), (WIDE, 8), (WIDE, 16)], ids=str
)
@each_exchange
def test_as_the_reference(gpu: GPU, exchange: str, case: Case, blocks: int) -> None:
    needs(gpu, exchange, blocks)
    drawn = draw(case, dtype=np.float32)
    found = results(gpu, drawn, Group(blocks, exchange))
    truth = reference(drawn, "tanh", np.float64)
    baseline = reference(drawn, "tanh", np.float32)
    for name, a in found.items():
        assert_close(
            f"{exchange} {name}", a, truth[name], length=case.length, baseline=baseline[name]
        )


@each_exchange
def test_the_same_bits_each_time(gpu: GPU, exchange: str) -> None:
    needs(gpu, exchange, 8)
    drawn = draw(WIDE, dtype=np.float32)
    first = results(gpu, drawn, Group(8, exchange))
    for _ in range(20):
        for name, a in results(gpu, drawn, Group(8, exchange)).items():
            assert_same_bits(name, a, first[name])


def test_probes(gpu: GPU) -> None:
    """Each does what it is timed for, and all that this GPU can do is measured."""
    limits = limits_of(gpu.cp.cuda.Device().id)
    found = measure_probes(seconds=0.02).latencies
    assert found.measured
    assert [size for size, _ in found.cluster] == [
        size for size in tuned.CLUSTERS if size <= limits.largest_cluster
    ]


def test_a_short_soak(gpu: GPU) -> None:
    outcomes = list(run_soak(40, kernel="group", limit=30.0))
    assert any(outcome.checked for outcome in outcomes)
