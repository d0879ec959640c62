"""``python -m gpurnn.bench``: the benchmark without the command line's packages.

As ``gpurnn bench``, but without its table: the result is the file --out, or JSON on stdout. With
"lm" it is the language model's. Exit codes: 0 done; 1 something failed; 2 a mistake in the command;
143 stopped by SIGTERM.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpurnn.bench import command
from gpurnn.bench.command import DEVICES, INSTALL, checked, draw, failures, measure
from gpurnn.bench.lm import command as lm
from gpurnn.bench.soak import Outcome, SoakError

__all__ = ["main"]

TOLD_EVERY = 100  # trials of a soak


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpurnn.bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="rnn", help="rnn, or lm: the language model")
    parser.add_argument("--device", default="auto", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--seconds", type=float, help="for each figure")
    parser.add_argument("--threads", type=int, default=2, help="on cpu, on both sides")
    parser.add_argument("--limit", type=float, help="on cuda: begin nothing new after so many s")
    parser.add_argument("--out", type=Path, help="write the result to this file, its plot beside")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--grid", default="default", help="on cuda: default, group or all")
    parser.add_argument("--probe", action="store_true", help="only measure the GPU's latencies")
    parser.add_argument("--soak", type=int, help="only run so many random shapes, twice each")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    parser.add_argument("--kernel", help="of the soak; unset: all")
    parser.add_argument("--compile", action="store_true", help="of lm on cpu: torch.compile too")
    given = parser.parse_args(arguments)
    try:
        others = {
            "grid": None if given.grid == "default" else given.grid,
            "probe": given.probe or None,
            "soak": given.soak,
            "seed": given.seed or None,
            "kernel": given.kernel,
        }
        command.check_what(given.what, compiled=given.compile, others=others)
        if given.what == "lm":
            return _lm(given)
        command.check_mode(
            probe=given.probe,
            soak=given.soak,
            seconds=given.seconds,
            out=given.out,
            grid=given.grid,
            kernel=given.kernel,
        )
        if given.soak is not None:
            return _soak(given)
        if given.probe:
            return _probe(given)
        asked = checked(
            given.device,
            given.seconds,
            given.threads,
            given.limit,
            given.out,
            _note,
            given.grid,
        )
    except ValueError as e:
        parser.error(str(e))
    try:
        result = measure(asked, _note)
    except ImportError as e:
        return _failed(f"{e} ({INSTALL})")
    except (ArithmeticError, OSError) as e:
        return _failed(str(e))
    if given.json or given.out is None:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
    if asked.out is not None and any("times_us" in record for record in result["records"]):
        if importlib.util.find_spec("matplotlib") is None:
            _note("no plot: matplotlib is not installed")
        else:
            try:
                _note(f"plot: {draw(asked.out)}")
            except (ValueError, OSError) as e:
                return _failed(f"no plot: {e}")
    told = failures(result)
    return _failed(told) if told else 0


def _lm(given: argparse.Namespace) -> int:
    asked = lm.checked_lm(
        given.device,
        given.seconds,
        given.threads,
        given.limit,
        given.out,
        _note,
        compiled=given.compile,
    )
    try:
        result = lm.measure(asked, _note)
    except ImportError as e:
        return _failed(f"{e} ({INSTALL})")
    except OSError as e:
        return _failed(str(e))
    if given.json or given.out is None:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
    told = failures(result)
    return _failed(told) if told else 0


def _probe(given: argparse.Namespace) -> int:
    asked = command.checked_probe(given.device, given.seconds, given.out, _note)
    try:
        found = command.measure_probes(asked, _note)
        if given.json or asked.out is None:
            print(json.dumps(found.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
        if asked.out is not None:
            command.write_probes(found, asked.out)
    except ImportError as e:
        return _failed(f"{e} ({INSTALL})")
    except (RuntimeError, OSError) as e:
        return _failed(str(e))
    return 0


def _soak(given: argparse.Namespace) -> int:
    asked = command.checked_soak(
        given.device, given.soak, given.seed, given.kernel, given.limit, _note
    )
    begun = time.monotonic()

    def progress(outcome: Outcome) -> None:
        done = outcome.trial.index + 1
        if done % TOLD_EVERY == 0:
            _note(f"{done:,} of {asked.count:,} trials, {time.monotonic() - begun:.0f} s")

    try:
        found = command.soak(asked, _note, progress)
    except SoakError as e:
        return _failed(str(e))
    except ImportError as e:
        return _failed(f"{e} ({INSTALL})")
    print(f"soak: {found}")
    return 0


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _failed(message: str) -> int:
    _note(f"error: {message}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
