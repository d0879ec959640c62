"""``gpurnn bench lm`` without the command line: the run, and its result on disk."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpurnn import validate
from gpurnn.bench.command import (
    INSTALL,
    Note,
    Result,
    check_out,
    check_seconds,
    device_of,
    stopped_by_sigterm,
)
from gpurnn.bench.lm.ahead import compile_lm
from gpurnn.bench.lm.measure import Setting, measure_lm, torch_peers
from gpurnn.bench.lm.report import lm_environment, lm_summary
from gpurnn.bench.lm.runs import lm_runs
from gpurnn.bench.lm.text import EDITION, benchmark_text

__all__ = ["AskedLM", "checked_lm", "measure"]

SECONDS = {"cpu": 2.0, "cuda": 0.5}
TOKENS = 28  # of the vocabulary: letters, the blank and <unk>


@dataclass(frozen=True)
class AskedLM:
    """A run that can be made; ``device`` is cpu or cuda, ``seconds`` those for each figure.

    ``compiled``: torch.compile is timed on a cpu too.
    """

    device: str
    seconds: float
    threads: int = 2
    limit: float | None = None
    out: Path | None = None
    compiled: bool = False


def checked_lm(
    device: str,
    seconds: float | None,
    threads: int,
    limit: float | None,
    out: Path | None,
    note: Note,
    *,
    compiled: bool = False,
) -> AskedLM:
    """Return the run that is asked for; None in ``seconds`` is the device's own.

    Raises:
        ValueError: it cannot be made; the message says what came and what was expected.
    """
    where = device_of(device, note)
    validate.positive("threads", threads)
    check_out(out)
    check_seconds(seconds=seconds, limit=limit)
    return AskedLM(
        where, SECONDS[where] if seconds is None else seconds, threads, limit, out, compiled
    )


def measure(asked: AskedLM, note: Note) -> dict[str, Any]:
    """Measure, and write what there is to ``asked.out`` after every record.

    Its ``complete`` is false until the end. SIGTERM ends the run by SystemExit (128 + 15) with what
    there is written.

    Raises:
        ImportError: something it needs is not installed.
        OSError: the file cannot be written.
    """
    with stopped_by_sigterm(), _threads(asked):
        return _measure(asked, note)


def _measure(asked: AskedLM, note: Note) -> dict[str, Any]:
    begun = time.monotonic()

    def left() -> float | None:
        return None if asked.limit is None else asked.limit - (time.monotonic() - begun)

    text, runs = benchmark_text(note), lm_runs(asked.device)
    peers = torch_peers(asked.device, compiled=asked.compiled or asked.device == "cuda")
    if not peers.train:
        note(f"torch is not installed: no comparison ({INSTALL})")
    result = Result(asked.out, lambda records: {"summary": lm_summary(records)})
    result.found = {
        "benchmark": "lm",
        "complete": False,
        "device": asked.device,
        "runs": len(runs),
        "seconds_for_a_figure": asked.seconds,
        "text": {**text.corpus.about(), "edition": EDITION, "tokens": text.tokens},
        "environment": lm_environment(asked.device, asked.threads),
        "records": [],
    }
    result.keep()
    try:
        if asked.device == "cuda":
            for failure in compile_lm(runs, TOKENS, limit=left()):
                note(f"could not be compiled ahead: {failure}")
        setting = Setting(asked.device, asked.seconds, text, peers)
        for record in measure_lm(setting, runs, limit=left()):
            result.add(record)
            _tell(record, note)
    except BaseException:
        result.keep()  # stopped, or broken in a way that no record tells: what there is
        raise
    result.keep(complete=True)
    return result.found


@contextmanager
def _threads(asked: AskedLM) -> Iterator[None]:
    """On a cpu, give both sides as many threads."""
    if asked.device != "cpu":
        yield
        return
    from threadpoolctl import threadpool_limits

    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(asked.threads)
    with threadpool_limits(asked.threads):
        yield


def _tell(record: dict[str, Any], note: Note) -> None:
    sizes = ", ".join(f"{name} {size}" for name, size in record["shape"].items())
    told = f"{record['group']} {sizes}"
    for what, word in (("left_out", "left out"), ("failed", "FAILED")):
        if what in record:
            note(f"{word}: {told}: {record[what]}")
            return
    note(f"done: {told}, {record['per_second']['median']:,.0f} {record['unit']} a second")
    for peer, found in record["peers"].items():
        for what, word in (("left_out", "left out"), ("failed", "failed")):
            if what in found:
                note(f"  {peer} {word}: {found[what]}")
