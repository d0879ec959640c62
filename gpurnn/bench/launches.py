"""The kernels of a pass on their own: launches recorded once, then queued again and again."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from gpurnn.cuda.engines import Engine
from gpurnn.cuda.specs import ARGUMENTS, KernelSpec
from gpurnn.planning import Limits

__all__ = ["RecordingEngine"]

Size = tuple[int, int, int]


@dataclass(eq=False)
class RecordingEngine:
    """An engine that runs everything on ``inner`` and remembers its launches."""

    inner: Engine
    launches: list[Callable[[], None]] = field(default_factory=list)
    count: int = 0  # of kernels: a call to launch may queue several

    @property
    def xp(self) -> Any:
        """What makes arrays."""
        return self.inner.xp

    @property
    def limits(self) -> Limits:
        """What the device can hold."""
        return self.inner.limits

    def here(self) -> AbstractContextManager[object]:
        """Return the inner engine's context."""
        return self.inner.here()

    def launch(
        self,
        spec: KernelSpec,
        grid: Size,
        block: Size,
        arrays: Sequence[Any],
        integers: Iterable[tuple[int, ...]] = ((),),
        shared: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Queue a kernel, and remember it with its arrays.

        The scratch of a group kernel must be 0 before each launch: what is remembered clears it.
        """
        each = list(integers)
        scratch = [
            a
            for a, what in zip(arrays, ARGUMENTS[spec.kind], strict=False)
            if spec.exchange is not None and what == "words"
        ]

        def run() -> None:
            self.inner.launch(
                spec, grid, block, arrays, each, shared, cluster=cluster, cooperative=cooperative
            )

        def again() -> None:
            for words in scratch:
                words.fill(0)
            run()

        run()
        self.launches.append(again)
        self.count += len(each)

    @property
    def patience(self) -> int:
        """How often a thread polls for another block."""
        return self.inner.patience

    def report(self, blocks: int) -> Any:
        """Return where blocks report."""
        return self.inner.report(blocks)

    def check_reports(self) -> None:
        """Raise if a block of an earlier launch reported."""
        self.inner.check_reports()

    def product(self, A: Any, B: Any, out: Any) -> None:
        """out = A B."""
        self.inner.product(A, B, out)

    def settle(self) -> None:
        """Wait for the current stream."""
        self.inner.settle()

    def replay(self) -> None:
        """Queue the remembered launches again, on the same arrays.

        A forward kernel may find the states where Z stood: other numbers, the same work.
        """
        for launch in self.launches:
            launch()
