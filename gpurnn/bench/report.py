"""What goes with the GPU benchmark's records: what they depend on, what they come to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpurnn.bench import common
from gpurnn.bench.floors import FORMULA

__all__ = ["NOTES", "gpu_environment", "gpu_summary", "ratio_summary"]

NOTES = {
    "figures": "a pass timed between events includes the gaps between its launches: where it is "
    "short, the host's speed. A name in _graph is the same pass as a CUDA graph, without them",
    "torch_forward": "PyTorch's forward pass alone runs under no_grad, in eval mode, and keeps "
    "nothing; ours keeps what its backward pass needs",
    "ids": "where our X holds token ids, peers get one-hot floats made before the clock starts, "
    "and compute no gradient of them",
    "floor": "of the recurrence alone; with tensor cores only where the record says so",
}
"""What has to be known to read the figures; goes with them."""

PACKAGES = (
    "gpurnn", "numpy", "cupy-cuda13x", "cupy-cuda12x", "numba", "numba-cuda", "cuda-core",
    "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink", "torch", "nvidia-cudnn-cu13", "jax",
)  # fmt: skip


def gpu_summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, per peer and pass, geometric mean and minimum of the ratios, and who failed.

    ``ratios`` leaves out runs with precision tf32; ``ratios_by_group`` has each group of runs on
    its own. ``concatenated_over_split``: time of the concatenated form over the split form's, by
    shape.
    """
    failed: dict[str, int] = {}
    late: dict[str, int] = {}
    forward: dict[tuple[tuple[int, ...], str], float] = {}
    for record in records:
        for peer, found in record.get("peers", {}).items():
            if "failed" in found:
                failed[peer] = failed.get(peer, 0) + 1
            if "left_out" in found:
                late[peer] = late.get(peer, 0) + 1
        if record["group"] == "forms" and "times_us" in record:
            sizes = tuple(record["shape"].values())
            forward[sizes, record["kernel"]] = record["times_us"]["forward"]["median"]
    groups = dict.fromkeys(record["group"] for record in records if record.get("ratios"))
    return {
        "ratios": ratio_summary([r for r in records if r.get("precision", "ieee") == "ieee"]),
        "ratios_by_group": {
            group: ratio_summary([r for r in records if r["group"] == group]) for group in groups
        },
        "peers_failed": failed,
        "peers_left_out": late,
        "concatenated_over_split": [
            {"shape": list(sizes), "forward": t / forward[sizes, "step"]}
            for (sizes, kernel), t in forward.items()
            if kernel == "concatenated" and (sizes, "step") in forward
        ],
        "left_out": sum("left_out" in record for record in records),
        "failed": sum("failed" in record for record in records),
    }


def ratio_summary(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return geometric mean, minimum and number of the ratios of each peer and pass."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for peer, found in record.get("ratios", {}).items():
            for what, ratio in found.items():
                ratios.setdefault(peer, {}).setdefault(what, []).append(ratio)
    return {
        peer: {
            what: {
                "geometric_mean": float(np.exp(np.mean(np.log(values)))),
                "least": min(values),
                "runs": len(values),
            }
            for what, values in passes.items()
        }
        for peer, passes in ratios.items()
    }


def gpu_environment(device: int | None = None) -> dict[str, Any]:
    """Return what a figure depends on: GPU, driver, CUDA, clocks, versions, commit, date."""
    from gpurnn.doctor.device import describe, nvidia_smi

    return {
        "gpu": describe(device),
        "nvidia_smi": nvidia_smi(),
        **common.machine(),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "date": common.date(),
        "floor": FORMULA,
        "notes": NOTES,
    }
