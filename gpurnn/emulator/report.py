"""What a launch did."""

from dataclasses import dataclass

from gpurnn.emulator.traffic import LineTraffic

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Counts of one launch.

    Attributes:
        threads: how many ran.
        barriers: completed barriers and warp operations, by kind.
        switches: how often the emulator went from one thread to another.
        shared_bytes: shared memory of a block, static and dynamic; the most any block used.
        traffic: what memory accesses cost, by source line; empty unless measured.
    """

    threads: int
    barriers: dict[str, int]
    switches: int
    shared_bytes: int
    traffic: tuple[LineTraffic, ...] = ()

    def table(self) -> str:
        """Return the traffic as text, a line each."""
        layout = "{:<40} {:<6} {:<6} {:>12} {:>8} {:>8}"
        head = layout.format("line", "space", "access", "instructions", "needed", "ideal")
        rows = [
            layout.format(f"{t.file}:{t.line}"[-40:], t.space, t.kind, *t[4:]) for t in self.traffic
        ]
        return "\n".join([head, *rows])

    def __str__(self) -> str:
        barriers = ", ".join(f"{n} × {kind}" for kind, n in sorted(self.barriers.items()))
        text = (
            f"{self.threads} threads, {self.switches} switches, {self.shared_bytes} bytes of "
            f"shared memory a block; {barriers or 'no barriers'}"
        )
        return f"{text}\n{self.table()}" if self.traffic else text
