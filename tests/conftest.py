"""What all tests share."""

import os
import signal

# Test processes side by side: each product stays on its own core. Before NumPy is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest
from hypothesis import settings

# The machines that run this differ in speed: no deadline for a single example.
settings.register_profile("gpurnn", deadline=None)
settings.load_profile("gpurnn")

# A job in the background starts with Ctrl-C ignored, and so would every process it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Also where NumPy was there already."""
    if hasattr(config, "workerinput"):
        from threadpoolctl import threadpool_limits

        threadpool_limits(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first, so that no process waits for another's last one."""
    first = {"test_published.py": 0, "test_training_outcomes.py": 1}
    items.sort(key=lambda item: first.get(item.path.name, 3 - len(list(item.iter_markers("slow")))))
