"""The kernels of a pass on their own: launches recorded once, then queued again and again."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from gpurnn.cuda.engines import Engine
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import Limits

__all__ = ["RecordingEngine"]

Size = tuple[int, int, int]

BESIDE = ("scatter", "column")
"""How the names of kernels begin that follow a pass, as products do."""


@dataclass(eq=False)
class RecordingEngine:
    """An engine that runs everything on ``inner`` and remembers its launches."""

    inner: Engine
    launches: list[Callable[[], None]] = field(default_factory=list)
    count: int = 0  # of kernels, steps' products and graphs: a call to launch may queue several
    within: bool = False  # a graph, which is remembered as a whole

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
        """Queue a kernel, and remember it with its arrays, if it belongs to the recurrence."""
        each = list(integers)

        def again() -> None:
            self.inner.launch(
                spec, grid, block, arrays, each, shared, cluster=cluster, cooperative=cooperative
            )

        if spec.kind.startswith(BESIDE):
            again()
        else:
            self._remember(again, len(each))

    def scratch(self, shape: tuple[int, ...]) -> Any:
        """Return the inner engine's, and remember to zero it before what is launched next."""
        words = self.inner.scratch(shape)
        self.launches.append(lambda: words.fill(0))
        return words

    def report(self, blocks: int) -> Any:
        """Return where blocks report."""
        return self.inner.report(blocks)

    def check_reports(self) -> None:
        """Raise if a block of an earlier launch reported."""
        self.inner.check_reports()

    def product(self, A: Any, B: Any, out: Any) -> None:
        """out = A B."""
        self.inner.product(A, B, out)

    def step_product(
        self, A: Any, B: Any, out: Any, workspace: Any, precision: str = "ieee"
    ) -> None:
        """out = A B of a step, which belongs to the recurrence and is remembered."""
        self._remember(lambda: self.inner.step_product(A, B, out, workspace, precision))

    def workspace(self) -> Any:
        """Return the inner engine's."""
        return self.inner.workspace()

    def capturing(self) -> bool:
        """Return whether the inner engine's stream is being captured."""
        return self.inner.capturing()

    @contextmanager
    def replayed(
        self,
        spec: KernelSpec,
        key: Hashable,
        make: Callable[[], NamedTuple],
        run: Callable[[Any, int], None],
    ) -> Iterator[tuple[Any, Callable[[int], None]]]:
        """Remember each replay of a graph, though not the copies into and out of its arrays."""

        def quietly(arrays: Any, steps: int) -> None:
            outer, self.within = self.within, True
            try:
                run(arrays, steps)
            finally:
                self.within = outer

        with self.inner.replayed(spec, key, make, quietly) as (arrays, play):
            yield arrays, lambda steps: self._remember(lambda: play(steps))

    def lasting(self) -> AbstractContextManager[object]:
        """Return the inner engine's context."""
        return self.inner.lasting()

    def settle(self) -> None:
        """Wait for the current stream."""
        self.inner.settle()

    def fetched(self, a: Any) -> NDArray[Any]:
        """Return a copy in the host's memory."""
        return self.inner.fetched(a)

    def _remember(self, queue: Callable[[], None], count: int = 1) -> None:
        queue()
        if not self.within:
            self.launches.append(queue)
            self.count += count

    def replay(self) -> None:
        """Queue the remembered launches again, on the same arrays.

        A forward kernel may find the states where Z stood: other numbers, the same work.
        """
        for launch in self.launches:
            launch()
