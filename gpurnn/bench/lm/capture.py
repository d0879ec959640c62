"""PyTorch work as a CUDA graph."""

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["captured"]

WARM_UPS = 3


def captured(run: Callable[[], object]) -> Any:
    """Run some times beside, which fills memory pools, then capture; return the graph.

    The runs count: whoever does not want what they left has to undo it.
    """
    cuda: Any = importlib.import_module("torch").cuda
    beside = cuda.Stream()
    beside.wait_stream(cuda.current_stream())
    with cuda.stream(beside):
        for _ in range(WARM_UPS):
            run()
    cuda.current_stream().wait_stream(beside)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        run()
    return graph
