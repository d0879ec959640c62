"""What ``gpurnn bench`` and ``python -m gpurnn.bench`` share: the run, and its result on disk.

It prints nothing, and needs neither typer nor rich: what is to be said goes to ``note``.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpurnn import bench as benchmark
from gpurnn import validate
from gpurnn.bench.probe import Probed
from gpurnn.bench.soak import SMALL, SMALL_CARD, Outcome
from gpurnn.cuda.engines import current_emulation, emulated
from gpurnn.files import write_atomically
from gpurnn.planning import KERNELS

__all__ = [
    "INSTALL",
    "Asked",
    "AskedSoak",
    "Result",
    "SoakCounts",
    "check_mode",
    "check_out",
    "check_seconds",
    "check_what",
    "checked",
    "checked_probe",
    "checked_soak",
    "device_of",
    "draw",
    "failures",
    "measure",
    "measure_probes",
    "soak",
    "stopped_by_sigterm",
    "write_probes",
]

INSTALL = "in the source folder: pip install -e '.[bench]'"
WHAT = ("rnn", "lm")
DEVICES = ("auto", "cpu", "cuda")
SOAK_DEVICES = ("auto", "cuda", "emulator")
SECONDS = {"cpu": 2.0, "cuda": 0.15}

Note = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """A run that can be made; ``device`` is cpu or cuda, ``seconds`` those for each figure."""

    device: str
    seconds: float
    threads: int = 2
    limit: float | None = None
    out: Path | None = None
    grid: str = "default"


@dataclass(frozen=True)
class AskedSoak:
    """A soak that can be made, of so many trials; ``device`` is cuda or emulator."""

    device: str
    count: int
    seed: int = 0
    kernel: str | None = None
    limit: float | None = None


@dataclass
class SoakCounts:
    """What a soak has come to: trials that ran, that plan() refused, that were compared."""

    ran: int = 0
    refused: int = 0
    compared: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        self.ran += not outcome.refused
        self.refused += bool(outcome.refused)
        self.compared += outcome.checked

    def __str__(self) -> str:
        return (
            f"{self.ran:,} ran twice with the same bits, {self.compared:,} of them compared with "
            f"the reference; {self.refused:,} refused by plan()"
        )


@dataclass
class Result:
    """What has been found so far; ``keep`` writes it to the file, whole, if there is one."""

    out: Path | None
    summed_up: Callable[[list[dict[str, Any]]], dict[str, Any]]
    found: dict[str, Any] = field(default_factory=dict)

    def keep(self, *, complete: bool = False) -> None:
        """Sum up and write; ``complete`` says that nothing more will come."""
        self.found["complete"] = complete
        self.found |= self.summed_up(self.found["records"])
        if self.out is not None:
            write_atomically(self.out, (json.dumps(self.found, indent=2) + "\n").encode())

    def add(self, record: dict[str, Any]) -> None:
        """Take a record, and write all there is."""
        self.found["records"].append(record)
        self.keep()


def checked(
    device: str,
    seconds: float | None,
    threads: int,
    limit: float | None,
    out: Path | None,
    note: Note,
    grid: str = "default",
) -> Asked:
    """Return the run that is asked for; None in ``seconds`` is the device's own.

    Raises:
        ValueError: it cannot be made; the message says what came and what was expected.
    """
    where = device_of(device, note)
    validate.positive("threads", threads)
    validate.choice("grid", grid, tuple(benchmark.GRIDS))
    check_out(out)
    check_seconds(seconds=seconds, limit=limit)
    seconds = SECONDS[where] if seconds is None else seconds
    return Asked(where, seconds, threads, limit, out, grid)


def check_what(what: str, *, compiled: bool, others: Mapping[str, object]) -> None:
    """Refuse what there is no benchmark of, and options that the one asked for would pass over.

    ``others`` are the options that "lm" does not have, None where they are not given.

    Raises:
        ValueError: one of them; the message names it.
    """
    validate.choice("what", what, WHAT)
    if what == "lm":
        for name, given in others.items():
            if given is not None:
                raise ValueError(f"{name} is {given}: expected nothing, beside lm")
    elif compiled:
        raise ValueError("compile is given: expected it beside lm alone")


def check_mode(
    *,
    probe: bool,
    soak: int | None,
    seconds: float | None,
    out: Path | None,
    grid: str,
    kernel: str | None,
) -> None:
    """Refuse options that what is asked for would pass over.

    Raises:
        ValueError: one of them; the message names it.
    """
    options = {
        "probe": probe or None,
        "seconds": seconds,
        "out": out,
        "grid": None if grid == "default" else grid,
    }
    if soak is None and kernel is not None:
        raise ValueError(f"kernel is {kernel!r}: expected it beside --soak alone")
    if soak is not None:
        mode = "--soak"
    elif probe:
        mode = "--probe"
        options = {"grid": options["grid"]}
    else:
        return
    for name, given in options.items():
        if given is not None:
            raise ValueError(f"{name} is {given}: expected nothing, beside {mode}")


def checked_probe(device: str, seconds: float | None, out: Path | None, note: Note) -> Asked:
    """Return the probing of a GPU that is asked for.

    Raises:
        ValueError: it cannot be made; the message says what came and what was expected.
    """
    if device not in ("auto", "cuda"):
        raise ValueError(f"device is {device!r}: expected 'cuda' or 'auto' with --probe")
    where = device_of("cuda", note)
    check_out(out)
    check_seconds(seconds=seconds)
    return Asked(where, SECONDS[where] if seconds is None else seconds, out=out)


def checked_soak(
    device: str, count: int, seed: int, kernel: str | None, limit: float | None, note: Note
) -> AskedSoak:
    """Return the soak that is asked for; "auto" is the GPU.

    Raises:
        ValueError: it cannot be made; the message says what came and what was expected.
    """
    if device not in SOAK_DEVICES:
        raise ValueError(f"device is {device!r}: expected one of {', '.join(SOAK_DEVICES)}")
    validate.positive("soak", count)
    validate.at_least("seed", seed, 0)
    if kernel is not None:
        validate.choice("kernel", kernel, KERNELS)
    check_seconds(limit=limit)
    where = device if device == "emulator" else device_of("cuda", note)
    return AskedSoak(where, count, seed, kernel, limit)


def measure_probes(asked: Asked, note: Note) -> Probed:
    """Run the probes.

    Raises:
        ImportError: something it needs is not installed.
        RuntimeError: a probe cannot be run, or does not do what it is timed for.
    """
    with stopped_by_sigterm():
        return benchmark.measure_probes(seconds=asked.seconds, note=note)


def write_probes(probed: Probed, out: Path) -> None:
    """Write what has been probed, and what it depends on, into a table (``gpurnn.tuned``).

    Raises:
        ValueError: the file is there and is no such table.
        OSError: it cannot be written.
    """
    benchmark.write_probes(probed, out, benchmark.gpu_environment())


def soak(asked: AskedSoak, note: Note, progress: Callable[[Outcome], None]) -> SoakCounts:
    """Run a soak; ``progress`` is told of every trial.

    Raises:
        SoakError: a trial failed; the message says which.
        ImportError: something it needs is not installed.
    """
    found = SoakCounts()
    with stopped_by_sigterm(), ExitStack() as around:
        options: dict[str, Any] = {}
        begun = time.monotonic()
        if asked.device == "emulator":
            around.enter_context(emulated(SMALL_CARD, seed=asked.seed))
            options = {"engine": current_emulation(), "sizes": SMALL, "every": 1}
        else:
            for failure in benchmark.compile_soak(
                asked.count, asked.seed, asked.kernel, limit=asked.limit
            ):
                note(f"could not be compiled ahead: {failure}")
        left = None
        if asked.limit is not None:
            left = max(0.0, asked.limit - (time.monotonic() - begun))
        for outcome in benchmark.run_soak(
            asked.count, seed=asked.seed, kernel=asked.kernel, limit=left, **options
        ):
            found.add(outcome)
            progress(outcome)
    return found


def check_out(out: Path | None) -> None:
    """Raise ValueError unless a result can be written there."""
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"out is {out}: {out.parent} is not a folder")


def check_seconds(**options: float | None) -> None:
    """Raise ValueError unless each is None or a number of seconds."""
    for name, given in options.items():
        if given is not None:
            validate.number(name, given, "a finite number above 0", lambda x: 0 < x < math.inf)


def measure(asked: Asked, note: Note) -> dict[str, Any]:
    """Measure, and write what there is to ``asked.out`` after every record.

    Its ``complete`` is false until the end. SIGTERM ends the run by SystemExit (128 + 15) with what
    there is written.

    Raises:
        ImportError: something it needs is not installed.
        ArithmeticError: a result on the cpu is wrong.
        OSError: the file cannot be written.
    """
    with stopped_by_sigterm():
        return _on_gpu(asked, note) if asked.device == "cuda" else _on_cpu(asked, note)


def draw(path: Path) -> Path:
    """Draw the plot of the result in a file beside it, and return its path.

    Raises:
        ValueError: the file is no result with something to draw.
        OSError: a file cannot be read or written.
        ImportError: matplotlib is not installed.
    """
    try:
        result = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    picture = path.with_suffix(".png")
    benchmark.plot(result, picture)
    return picture


def failures(result: dict[str, Any]) -> str:
    """Return how many runs failed, in words; empty if none did."""
    failed = result.get("summary", {}).get("failed")
    return f"{failed} of {len(result['records'])} runs failed: see above" if failed else ""


def device_of(asked: str, note: Note) -> str:
    """Return cpu or cuda; ``note`` is told why "auto" is the former.

    Raises:
        ValueError: there is no such device.
    """
    from gpurnn.doctor.device import why_no_gpu

    if asked not in DEVICES:
        raise ValueError(f"device is {asked!r}: expected one of {', '.join(DEVICES)}")
    if asked == "cpu":
        return asked
    missing = why_no_gpu()
    if missing is None:
        return "cuda"
    if asked == "cuda":
        raise ValueError(f"device is 'cuda' but there is no GPU to use: {missing}")
    note(f"no GPU to use ({missing}): measuring on cpu")
    return "cpu"


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """End by SystemExit when SIGTERM comes, so that what is under way is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set in the main thread alone
        return

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_cpu(asked: Asked, note: Note) -> dict[str, Any]:
    where = benchmark.environment(asked.threads)
    if where["versions"]["torch"] == "not installed":
        note(f"torch is not installed: no comparison ({INSTALL})")
    result = Result(asked.out, lambda records: dict(benchmark.summary(records)))
    result.found = {"complete": False, "environment": where, "records": []}
    for record in benchmark.measure_cpu(seconds=asked.seconds, threads=asked.threads):
        result.add(record)
        note(f"done: {record['shape']}")
    result.keep(complete=True)
    return result.found


def _on_gpu(asked: Asked, note: Note) -> dict[str, Any]:
    begun = time.monotonic()

    def left() -> float | None:
        return None if asked.limit is None else asked.limit - (time.monotonic() - begun)

    runs = benchmark.GRIDS[asked.grid]
    result = Result(asked.out, lambda records: {"summary": benchmark.gpu_summary(records)})
    result.found = {
        "complete": False,
        "grid": asked.grid,
        "runs": len(runs),
        "environment": benchmark.gpu_environment(),
        "overhead_us": {},
        "records": [],
    }
    result.keep()
    try:
        for failure in benchmark.compile_runs(runs, limit=left()):
            note(f"could not be compiled ahead: {failure}")
        if (rest := left()) is None or rest > 0:
            result.found["overhead_us"] = _overhead(asked.seconds, note)
        for record in benchmark.measure_gpu(seconds=asked.seconds, limit=left(), runs=runs):
            result.add(record)
            _tell(record, note)
    except BaseException:
        result.keep()  # stopped, or broken in a way that no record tells: what there is
        raise
    result.keep(complete=True)
    return result.found


def _overhead(seconds: float, note: Note) -> dict[str, Any]:
    try:
        return benchmark.measure_overhead(seconds=seconds)
    except Exception as e:  # the other figures must not be lost by it
        note(f"FAILED: overhead: {type(e).__name__}: {e}")
        return {"failed": f"{type(e).__name__}: {e}"}


def _tell(record: dict[str, Any], note: Note) -> None:
    told = f"{record['group']} {record['shape']} {record['dtype']}"
    told += " tf32" if record.get("precision") == "tf32" else ""
    if "left_out" in record:
        note(f"left out: {told}: {record['left_out']}")
        return
    if "failed" in record:
        note(f"FAILED: {told}: {record['failed']}")
        return
    note(f"done: {told}, {record['us_per_step']['forward']:.3f} µs a step forward")
    for peer, found in record.get("peers", {}).items():
        for what in ("failed", "left_out"):
            if what in found:
                note(f"  {peer} {what.replace('_', ' ')}: {found[what]}")
