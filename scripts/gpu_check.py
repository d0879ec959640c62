#!/usr/bin/env python3
"""Check and measure gpurnn on a machine with an NVIDIA GPU, in under ten minutes:

    python3 scripts/gpu_check.py --out gpu-results

It runs the checkout it lies in, which need not be installed. Python, 3.11 or later, needs numpy,
cupy, numba and numba-cuda with its compiler (what `gpurnn[cuda13]` asks for), and pytest and
hypothesis for the tests. Not needed, but used if they are there: torch and jax to compare with,
ml_dtypes for bfloat16, greenlet for the emulator, matplotlib for the plot. The packages of the
command line (typer, rich), pooch and threadpoolctl are not needed. Its parts follow each other
whatever the one before came to, each with its own time limit:

    import     every module that the parts after it need can be imported, the checkout's too
    doctor     what is installed, which GPU there is, kernels against the reference
    tests      the tests with the marker gpu
    memcheck   a few small cases under compute-sanitizer, if that is installed
    racecheck  the same
    probe      what the GPU's exchanges between blocks take
    soak       random shapes, each twice, for a minute at most
    group      the benchmark where W_hh is split over blocks, and of a whole book in one pass
    lm         the language model's benchmark, training and generating
    bench      the benchmark

In the folder --out (else $OUT, else gpu-results) it writes summary.json (outcome, exit code and
seconds of each part), imports.json, doctor.json, tests.json, tuned.json (a table for GPURNN_TUNED),
soak.txt, lm.json, group.json and bench.json with their plots, and log.txt, all that was printed.
Exit code: 0 every part passed; 1 one failed or ran out of time; 3 none failed, but one could not be
run, and summary.json says why; 2 a mistake in the command.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 560.0  # seconds
LEAST = 5.0  # seconds a part needs to be begun at all
MARGIN = 50.0  # of the benchmark's limit: for the run in hand when it is reached
GROUP_LIMIT = 220.0  # seconds, of its benchmark
LM_LIMIT = 150.0  # seconds, of the language model's
SOAK_MARGIN = 12.0  # of its limit, for what is being compiled when it is reached
MOST_TRIALS = "9999"  # more would be drawn from more kernels than can be compiled meanwhile
GRACE = 5.0  # seconds between asking a part to stop and making it
NEVER = "not begun: the time of the budget was used up"


@dataclass(frozen=True)
class Part:
    """One step: a command given the seconds it has, and how to read what it left behind.

    ``judge`` gets the exit code and returns outcome and detail; by default 0 is "passed".
    ``skip`` is why it cannot be run, empty if it can.
    """

    name: str
    limit: float
    command: Callable[[float], list[str]]
    judge: Callable[[int], tuple[str, str]] | None = None
    stdout: Path | None = None  # a file for stdout alone; else it goes to the log
    writes: tuple[Path, ...] = ()  # results; those of an earlier run are removed before
    skip: str = ""


@dataclass
class Result:
    """What became of a part; outcome: passed, failed, timed out or skipped."""

    name: str
    outcome: str
    detail: str = ""
    rc: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    command: list[str] = field(default_factory=list)


def make_view(root: Path, folder: Path) -> Path:
    """Make a folder from which the packages of a checkout can be imported, and return it.

    In a checkout `gpurnn.kernels` lies in ./kernels, and an installation puts it in place. Here a
    folder gpurnn of symbolic links does: to each file and folder of ./gpurnn, and to ./kernels.
    """
    if not (root / "gpurnn" / "__init__.py").is_file() or not (root / "kernels").is_dir():
        raise FileNotFoundError(f"{root} is no checkout of gpurnn: no folders gpurnn and kernels")
    package = folder / "gpurnn"
    package.mkdir(parents=True)
    for entry in sorted((root / "gpurnn").iterdir()):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(root / "kernels")
    return folder


def environment(view: Path, cache: Path) -> dict[str, str]:
    """Return the environment of the parts: the view before all else, and a fresh kernel cache."""
    found = dict(os.environ)
    others = found.get("PYTHONPATH")
    found["PYTHONPATH"] = os.pathsep.join([str(view), *([others] if others else [])])
    found["PYTHONUNBUFFERED"] = "1"
    found.setdefault("GPURNN_CACHE", str(cache))
    return found


def run_part(part: Part, seconds: float, cwd: Path, env: dict[str, str], log: IO[bytes]) -> Result:
    """Run a part for at most so many seconds; what it prints goes to the log."""
    result = Result(part.name, "skipped", part.skip, limit=seconds)
    if part.skip:
        return result
    if seconds < LEAST:
        result.detail = NEVER
        return result
    for path in part.writes:
        path.unlink(missing_ok=True)
    result.command = part.command(seconds)
    log.write(f"\n===== {part.name}: {' '.join(result.command)}\n".encode())
    log.flush()
    begun = time.monotonic()
    stdout = part.stdout.open("wb") if part.stdout else None
    try:
        process = subprocess.Popen(
            result.command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout or log,
            stderr=log,
            start_new_session=True,  # so that it can be stopped with all it started
        )
        try:
            result.rc = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            result.outcome, result.detail = "timed out", f"stopped after {seconds:.0f} seconds"
        finally:
            if process.poll() is None:
                result.rc = _stop(process)
    except OSError as e:
        result.outcome, result.detail = "failed", f"could not be started: {e}"
    finally:
        if stdout:
            stdout.close()
        result.seconds = round(time.monotonic() - begun, 2)
    if result.outcome == "skipped" and result.rc is not None:
        result.outcome, result.detail = _judged(part, result.rc)
    elif result.outcome == "timed out" and part.judge is not None and result.rc is not None:
        result.detail += f"; {_judged(part, result.rc)[1]}"  # how far it had come
    return result


def _judged(part: Part, rc: int) -> tuple[str, str]:
    try:
        if part.judge is not None:
            return part.judge(rc)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as e:
        return "failed", f"exit code {rc}, and its result cannot be read: {type(e).__name__}: {e}"
    return ("passed", "") if rc == 0 else ("failed", f"exit code {rc}")


def _stop(process: "subprocess.Popen[bytes]") -> int:
    """Stop a part that is running, and whatever it started."""
    for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        os.killpg(process.pid, number)
        try:
            return process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def summed_up(junit: Path) -> dict[str, object]:
    """Return pytest's result from its JUnit file: counts, what failed, why was skipped, slowest."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    reasons: dict[str, int] = {}
    times: list[tuple[float, str]] = []
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        times.append((float(case.get("time") or 0), name))
        wrong = [tag for tag in (case.find("failure"), case.find("error")) if tag is not None]
        skipped = case.find("skipped")
        if wrong:
            counts["failed"] += 1
            text = f"{wrong[0].get('message')}\n{wrong[0].text or ''}"
            failures.append({"test": name, "message": text[:4000]})
        elif skipped is not None:
            counts["skipped"] += 1
            reason = str(skipped.get("message"))
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    slowest = [{"test": name, "seconds": t} for t, name in sorted(times, reverse=True)[:10]]
    return {**counts, "failures": failures, "skip_reasons": reasons, "slowest": slowest}


def judge_tests(rc: int, junit: Path, out: Path) -> tuple[str, str]:
    """Write the tests' summary as JSON and judge it: nothing may fail, something must pass."""
    found = summed_up(junit)
    out.write_text(json.dumps(found, indent=2) + "\n")
    told = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))
    if rc not in (0, 5) or found["failed"]:
        return "failed", f"{told}, exit code {rc}"
    if not found["passed"]:
        return "skipped", f"{told}: {'; '.join(found['skip_reasons'])}"  # type: ignore[arg-type]
    return "passed", told


def judge_doctor(rc: int, out: Path) -> tuple[str, str]:
    """Judge the doctor by its findings; without a GPU there is nothing to check."""
    findings = json.loads(out.read_text())["findings"]
    failed = [f"{f['name']}: {f['detail']}" for f in findings if f["status"] == "failed"]
    if rc or failed:
        return "failed", "; ".join(failed) or f"exit code {rc}"
    absent = [f["detail"] for f in findings if f["name"] == "GPU" and f["status"] == "missing"]
    return ("skipped", absent[0]) if absent else ("passed", f"{len(findings)} findings")


def judge_imports(out: Path) -> tuple[str, str]:
    """Judge what could be imported: what is needed must be."""
    found = json.loads(out.read_text())
    if found["missing"]:
        return "failed", "; ".join(f"{name}: {error}" for name, error in found["missing"].items())
    return "passed", f"without {', '.join(found['without'])}" if found["without"] else ""


def judge_probe(rc: int, out: Path) -> tuple[str, str]:
    """Judge the probes by the table that they leave."""
    if rc or not out.exists():
        return "failed", f"no table was written, exit code {rc}: see log.txt"
    told = []
    for name, entry in json.loads(out.read_text())["gpus"].items():
        found = {k: v for k, v in entry["latencies_ns"].items() if not isinstance(v, list)}
        found |= {f"cluster of {size}": ns for size, ns in entry["latencies_ns"]["cluster"]}
        told.append(f"{name}: " + ", ".join(f"{what} {ns:.0f} ns" for what, ns in found.items()))
    return "passed", "; ".join(told)


def judge_soak(rc: int, out: Path) -> tuple[str, str]:
    """Judge the soak by its exit code; it must have run something."""
    told = out.read_text().strip()
    if rc or not told:
        return "failed", f"exit code {rc}: see log.txt"
    return ("failed" if told.startswith("soak: 0 ran") else "passed"), told.removeprefix("soak: ")


def judge_bench(rc: int, out: Path) -> tuple[str, str]:
    """Judge the benchmark by its result: something must have been measured, nothing be wrong."""
    if not out.exists():
        return "failed", f"nothing was measured, exit code {rc}: see log.txt"
    result = json.loads(out.read_text())
    records = result["records"]
    measured = [r for r in records if "times_us" in r or "per_second" in r]
    counts = {what: sum(what in r for r in records) for what in ("left_out", "failed")}
    told = f"{len(measured)} of {result.get('runs', len(records))} measured"
    told += "".join(f", {n} {what.replace('_', ' ')}" for what, n in counts.items() if n)
    told += f"; peers: {_peers_told(measured)}"
    if not result["complete"]:
        told += "; it did not come to its end"
    wrong = rc != 0 or not measured or counts["failed"] or not result["complete"]
    if wrong and rc:
        told += f"; exit code {rc}"
    return "failed" if wrong else "passed", told


def _peers_told(measured: Sequence[dict[str, Any]]) -> str:
    peers: dict[str, dict[str, int]] = {}
    for record in measured:
        for name, found in record.get("peers", {}).items():
            what = next((w for w in ("failed", "left_out") if w in found), "measured")
            counts = peers.setdefault(name, {})
            counts[what] = counts.get(what, 0) + 1
    told = [
        f"{name} " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items())
        for name, counts in sorted(peers.items())
    ]
    if not any(name.startswith("torch") and "measured" in peers[name] for name in peers):
        told.append("no torch to compare with")
    return "; ".join(told)


def sanitizer() -> str | None:
    """Return compute-sanitizer's path: on PATH, or in the CUDA toolkit's usual place."""
    for folder in (
        None,
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
    ):
        places = None if folder is None else f"{folder}/bin{os.pathsep}{folder}/compute-sanitizer"
        found = shutil.which("compute-sanitizer", path=places)
        if found:
            return found
    return None


def gpu_tests(root: Path) -> list[str]:
    """Return the test files that have tests with the marker gpu."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text()]


def parts_of(root: Path, out: Path, scratch: Path) -> list[Part]:
    """Return what is to be run, in its order."""
    python = sys.executable
    junit = scratch / "junit.xml"
    script = str(Path(__file__).resolve())

    def tests(_: float) -> list[str]:
        options = ["-m", "gpu", "-c", str(root / "pyproject.toml"), "--rootdir", str(root)]
        options += ["-p", "no:cacheprovider", f"--junitxml={junit}", "--durations=10"]
        return [python, "-m", "pytest", *options, *gpu_tests(root)]

    def bench(grid: str, figures: Path) -> Part:
        def command(seconds: float) -> list[str]:
            limit = str(max(1.0, round(seconds - MARGIN, 1)))
            options = ["--device", "cuda", "--grid", grid, "--limit", limit, "--out", str(figures)]
            return [python, "-m", "gpurnn.bench", *options]

        return Part(
            figures.stem,
            BUDGET if grid == "default" else GROUP_LIMIT,
            command,
            lambda rc: judge_bench(rc, figures),
            writes=(figures, figures.with_suffix(".png")),
        )

    def lm(seconds: float) -> list[str]:
        limit = str(max(1.0, round(seconds - MARGIN, 1)))
        options = ["--device", "cuda", "--limit", limit, "--out", str(language_model)]
        return [python, "-m", "gpurnn.bench", "lm", *options]

    def soak(seconds: float) -> list[str]:
        limit = str(max(1.0, round(seconds - SOAK_MARGIN, 1)))
        return [python, "-m", "gpurnn.bench", "--soak", MOST_TRIALS, "--limit", limit]

    def sanitized(tool: str) -> Part:
        program = sanitizer()
        options = ["--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60"]
        if tool == "memcheck":
            options += ["--padding", "32", "--report-api-errors", "no"]
        else:
            options += ["--racecheck-detect-level", "error"]
        return Part(
            tool,
            60.0,
            lambda _: [str(program), *options, python, script, "--cases"],
            judge_cases,
            skip="" if program else "compute-sanitizer was not found (it is in the CUDA toolkit)",
        )

    doctor, imports, table = (out / f"{name}.json" for name in ("doctor", "imports", "tuned"))
    soaked, language_model = out / "soak.txt", out / "lm.json"
    return [
        Part(
            "import",
            40.0,
            lambda _: [python, script, "--imports"],
            lambda _: judge_imports(imports),
            stdout=imports,
            writes=(imports,),
        ),
        Part(
            "doctor",
            120.0,
            lambda _: [python, "-m", "gpurnn.doctor", "--json"],
            lambda rc: judge_doctor(rc, doctor),
            stdout=doctor,
            writes=(doctor,),
        ),
        Part(
            "tests",
            180.0,
            tests,
            lambda rc: judge_tests(rc, junit, out / "tests.json"),
            writes=(out / "tests.json",),
            skip="" if gpu_tests(root) else "no test has the marker gpu",
        ),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Part(
            "probe",
            30.0,
            lambda _: [python, "-m", "gpurnn.bench", "--probe", "--out", str(table)],
            lambda rc: judge_probe(rc, table),
            writes=(table,),
        ),
        Part(
            "soak",
            60.0,
            soak,
            lambda rc: judge_soak(rc, soaked),
            stdout=soaked,
            writes=(soaked,),
        ),
        bench("group", out / "group.json"),
        Part(
            "lm",
            LM_LIMIT,
            lm,
            lambda rc: judge_bench(rc, language_model),
            writes=(language_model,),
        ),
        bench("default", out / "bench.json"),
    ]


NO_GPU, WRONG, SANITIZER = 3, 4, 9  # exit codes: ours of --cases, and compute-sanitizer's


def judge_cases(rc: int) -> tuple[str, str]:
    """Judge cases under compute-sanitizer by the exit code, its own or that of --cases."""
    known = {
        0: ("passed", ""),
        NO_GPU: ("skipped", "no GPU: no case was run"),
        WRONG: ("failed", "a case gave wrong numbers: see log.txt"),
        SANITIZER: ("failed", "compute-sanitizer found errors: see log.txt"),
    }
    return known.get(rc, ("failed", f"it crashed, exit code {rc}: see log.txt"))


def run_cases() -> int:
    """Run small cases on the GPU, forward and backward, for each kernel and dtype.

    Return 0; NO_GPU; WRONG if numbers are wrong; 1 if a case could not be finished.
    """
    from gpurnn.cuda.engines import cupy
    from gpurnn.doctor.device import why_no_gpu
    from gpurnn.doctor.kernels import gpu_checks

    missing = why_no_gpu()
    if missing is not None:
        print(f"no GPU, no case was run: {missing}")
        return NO_GPU
    cupy().cuda.set_allocator(None)  # no pool: memory ends where the array does
    findings = list(gpu_checks())
    for finding in findings:
        print(f"{finding.status}: {finding.name}: {finding.detail}", flush=True)
    failed = [finding for finding in findings if finding.status == "failed"]
    if any(finding.detail.startswith("wrong numbers") for finding in failed):
        return WRONG
    return 1 if failed or not findings else 0


NEEDED = ("numpy", "cupy", "numba.cuda", "cuda.bindings.nvvm", "cuda.bindings.nvjitlink")
NEEDED += ("cuda.bindings.driver",)
NEEDED += ("cuda.core", "pytest", "hypothesis", "gpurnn", "gpurnn.kernels", "gpurnn.cuda.engines")
NEEDED += ("gpurnn.doctor.__main__", "gpurnn.bench.__main__")
USED = ("torch", "jax", "ml_dtypes", "greenlet", "matplotlib")  # if they are there


def try_imports() -> int:
    """Import all that the parts need; print what cannot be as JSON, and where gpurnn lies."""
    failed: dict[str, str] = {}
    for name in (*NEEDED, *USED):
        try:
            importlib.import_module(name)
        except Exception as e:  # a broken package may raise anything
            failed[name] = f"{type(e).__name__}: {e}"
    missing = {name: error for name, error in failed.items() if name in NEEDED}
    without = {name: error for name, error in failed.items() if name in USED}
    places = {
        name: getattr(sys.modules.get(name), "__file__", None)
        for name in ("gpurnn", "gpurnn.kernels")
    }
    print(json.dumps({"missing": missing, "without": without, "places": places}, indent=2))
    return 1 if missing else 0


def run_all(parts: Sequence[Part], budget: float, out: Path, view: Path) -> list[Result]:
    """Run the parts one after the other, within the budget; write the log and the summary."""
    begun = time.monotonic()
    results: list[Result] = []
    env = environment(view, view.parent / "cache")
    with (out / "log.txt").open("wb", buffering=0) as log:
        for part in parts:
            left = budget - (time.monotonic() - begun)
            print(f"{part.name} …", file=sys.stderr, flush=True)
            result = run_part(part, min(part.limit, left), view, env, log)
            results.append(result)
            detail = f" ({result.detail})" if result.detail else ""
            print(
                f"{part.name}: {result.outcome}, {result.seconds:.1f} s{detail}",
                file=sys.stderr,
                flush=True,
            )
            write_summary(out, results, budget, time.monotonic() - begun)
    return results


def write_summary(out: Path, results: Sequence[Result], budget: float, seconds: float) -> None:
    """Write summary.json: so far, in case nothing comes after."""
    summary = {
        "all_passed": all(result.outcome == "passed" for result in results),
        "seconds": round(seconds, 1),
        "budget": budget,
        "parts": [asdict(result) for result in results],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    """Run the script; ``parts`` stands in for its own."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds for all parts [default: {BUDGET:g}]"
    )
    parser.add_argument(
        "--only", default=None, help="parts to run, with commas between, such as doctor,bench"
    )
    parser.add_argument(
        "--cases", action="store_true", help="only run the small cases that memcheck watches"
    )
    parser.add_argument(
        "--imports", action="store_true", help="only try to import what the parts need"
    )
    given = parser.parse_args(arguments)
    if given.imports:
        return try_imports()
    if given.cases:
        return run_cases()
    if not 0 < given.budget < float("inf"):
        parser.error(f"--budget is {given.budget}: expected seconds, above 0")
    out: Path = (given.out or Path(os.environ.get("OUT") or "gpu-results")).resolve()
    with tempfile.TemporaryDirectory(prefix="gpurnn-check-") as temporary:
        scratch = Path(temporary)
        chosen = list(parts if parts is not None else parts_of(ROOT, out, scratch))
        if given.only is not None:
            names = [part.name for part in chosen]
            wanted = given.only.split(",")
            if unknown := [name for name in wanted if name not in names]:
                parser.error(f"--only names {', '.join(unknown)}: expected {', '.join(names)}")
            chosen = [part for part in chosen if part.name in wanted]
        out.mkdir(parents=True, exist_ok=True)
        view = make_view(ROOT, scratch / "view")
        results = run_all(chosen, given.budget, out, view)
    print(f"\n{'part':<10} {'outcome':<10} {'seconds':>8}")
    for result in results:
        print(f"{result.name:<10} {result.outcome:<10} {result.seconds:>8.1f}  {result.detail}")
    print(f"results: {out}")
    outcomes = {result.outcome for result in results}
    if outcomes & {"failed", "timed out"}:
        return 1
    return 3 if "skipped" in outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
