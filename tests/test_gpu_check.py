"""The script for machines with a GPU: its parts, time, summary, and view of the checkout."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


check = load()


def part(name: str, code: str, limit: float = 60.0, **more: Any) -> Any:
    return check.Part(name, limit, lambda _: [sys.executable, "-c", code], **more)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def run(out: Path, *parts: Any, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    code = check.main(["--out", str(out), *options], parts=parts)
    return code, summary(out)


def test_all_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path / "new", part("one", "print('from one')"), part("two", ""))
    assert code == 0
    assert found["all_passed"] is True
    assert [(p["name"], p["outcome"], p["rc"]) for p in found["parts"]] == [
        ("one", "passed", 0),
        ("two", "passed", 0),
    ]
    log = (tmp_path / "new" / "log.txt").read_text()
    assert "===== one:" in log and "\nfrom one\n" in log
    assert "two        passed" in capsys.readouterr().out


def test_goes_on_after_a_failure(tmp_path: Path) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    absent = check.Part("absent", 60.0, lambda _: [str(tmp_path / "no such program")])
    code, found = run(
        tmp_path, part("wrong", "raise SystemExit(3)"), part("crash", crash), absent, part("ok", "")
    )
    assert code == 1
    assert not found["all_passed"]
    assert [p["outcome"] for p in found["parts"]] == ["failed", "failed", "failed", "passed"]
    assert [p["rc"] for p in found["parts"]] == [3, -9, None, 0]
    assert "could not be started" in found["parts"][2]["detail"]


def test_part_is_stopped_at_its_limit_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it does not listen; and what it printed until then is kept."""
    monkeypatch.setattr(check, "LEAST", 0.0)
    monkeypatch.setattr(check, "GRACE", 0.2)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    begun = time.monotonic()
    rc, found = run(tmp_path, part("slow", code, limit=1.5), part("next", ""))
    assert time.monotonic() - begun < 30
    assert rc == 1
    slow, after = found["parts"]
    assert (slow["outcome"], slow["rc"]) == ("timed out", -9)
    assert slow["detail"] == "stopped after 2 seconds"
    assert after["outcome"] == "passed"
    assert "begun" in (tmp_path / "log.txt").read_text()
    time.sleep(max(0.0, 5.0 - (time.monotonic() - begun)))
    assert not mark.exists()


def test_budget(tmp_path: Path) -> None:
    """A part gets its own limit or what is left; with too little left it is not begun."""
    given: list[float] = []

    def command(seconds: float) -> list[str]:
        given.append(seconds)
        return [sys.executable, "-c", "import time; time.sleep(1)"]

    parts = [check.Part("own", 7.0, command), check.Part("rest", 1e3, command), part("none", "")]
    code, found = run(tmp_path, *parts, options=("--budget", "6.9"))
    assert given[0] == pytest.approx(6.9, abs=0.2)
    assert given[1] == pytest.approx(5.9, abs=0.5)
    assert code == 3
    assert found["parts"][2]["detail"] == check.NEVER
    assert found["budget"] == 6.9


def test_skipped_is_not_passed(tmp_path: Path) -> None:
    code, found = run(tmp_path, part("a", ""), part("b", "", skip="not installed"))
    assert code == 3
    assert not found["all_passed"]
    assert found["parts"][1]["outcome"] == "skipped"
    assert found["parts"][1]["detail"] == "not installed"


def test_results_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    old, kept = tmp_path / "old.json", tmp_path / "kept.json"
    old.write_text("{}")
    kept.write_text("{}")
    run(tmp_path, part("a", "", writes=(old,)), part("b", "", skip="no", writes=(kept,)))
    assert not old.exists()
    assert kept.exists()


def test_stdout_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    run(tmp_path, part("a", "import sys; print('x'); print('y', file=sys.stderr)", stdout=own))
    assert own.read_text() == "x\n"
    assert "y\n" in (tmp_path / "log.txt").read_text()


def test_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part("a", ""), part("b", ""), part("c", "")]
    _, found = run(tmp_path, *parts, options=("--only", "c,a"))
    assert [p["name"] for p in found["parts"]] == ["a", "c"]
    with pytest.raises(SystemExit, match="2"):
        check.main(["--only", "d"], parts=parts)
    assert "--only names d: expected a, b, c" in capsys.readouterr().err


def test_folder_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "named"))
    assert check.main([], parts=[part("a", "")]) == 0
    assert summary(tmp_path / "named")["all_passed"]
    monkeypatch.delenv("OUT")
    monkeypatch.chdir(tmp_path)
    assert check.main([], parts=[part("a", "")]) == 0
    assert summary(tmp_path / "gpu-results")["all_passed"]


JUNIT = """<testsuites><testsuite>
<testcase classname="test_gpu" name="one" time="1.5"/>
<testcase classname="test_gpu" name="two" time="0.5"><skipped message="needs two GPUs"/></testcase>
{more}
</testsuite></testsuites>"""
FAILED = """<testcase classname="test_gpu" name="three" time="9">
<failure message="off by 1">trace</failure></testcase>"""


def test_tests_are_summed_up(tmp_path: Path) -> None:
    junit, out = tmp_path / "junit.xml", tmp_path / "tests.json"
    junit.write_text(JUNIT.format(more=""))
    assert check.judge_tests(0, junit, out) == ("passed", "1 passed, 0 failed, 1 skipped")
    junit.write_text(JUNIT.format(more=FAILED))
    told = "1 passed, 1 failed, 1 skipped, exit code 1"
    assert check.judge_tests(1, junit, out) == ("failed", told)
    found = json.loads(out.read_text())
    assert found["failures"] == [{"test": "test_gpu::three", "message": "off by 1\ntrace"}]
    assert found["skip_reasons"] == {"needs two GPUs": 1}
    assert found["slowest"][0] == {"test": "test_gpu::three", "seconds": 9.0}


def test_tests_that_all_skip_have_not_passed(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuite><testcase classname='a' name='b' time='0'>"
        "<skipped message='no GPU: none'/></testcase></testsuite>"
    )
    outcome, told = check.judge_tests(0, junit, tmp_path / "tests.json")
    assert (outcome, told) == ("skipped", "0 passed, 0 failed, 1 skipped: no GPU: none")


def test_tests_that_leave_no_result_have_failed(tmp_path: Path) -> None:
    def judge(rc: int) -> Any:
        return check.judge_tests(rc, tmp_path / "none.xml", tmp_path / "tests.json")

    code, found = run(tmp_path, part("tests", "raise SystemExit(4)", judge=judge))
    assert code == 1
    assert found["parts"][0]["detail"].startswith("exit code 4, and its result cannot be read: ")


@pytest.mark.parametrize(
    ("rc", "findings", "outcome", "told"),
    [
        (0, [("GPU 0", "ok", "an H100")], "passed", "1 findings"),
        (0, [("GPU", "missing", "no GPU: none")], "skipped", "no GPU: none"),
        (1, [("NVVM", "failed", "gone"), ("x", "ok", "")], "failed", "NVVM: gone"),
        (1, [], "failed", "exit code 1"),
    ],
)
def test_doctor_is_judged(tmp_path: Path, rc: int, findings: Any, outcome: str, told: str) -> None:
    out = tmp_path / "doctor.json"
    names = ("name", "status", "detail")
    out.write_text(json.dumps({"findings": [dict(zip(names, f, strict=True)) for f in findings]}))
    assert check.judge_doctor(rc, out) == (outcome, told)


def test_view_of_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """Everything is found, with nothing of an installed gpurnn in the way, from any folder."""
    view = check.make_view(ROOT, tmp_path / "view")
    script = (
        "import gpurnn, gpurnn.kernels, gpurnn.bench.common as c\n"
        "print(gpurnn.__file__); print(gpurnn.kernels.__file__); print(c.__file__)"
    )
    env = check.environment(view, tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    package = view / "gpurnn"
    expected = [package / "__init__.py", package / "kernels" / "__init__.py"]
    assert [Path(line) for line in done.stdout.split()] == [
        *expected,
        package / "bench" / "common.py",
    ]
    assert expected[0].resolve() == ROOT / "gpurnn" / "__init__.py"
    assert expected[1].resolve() == ROOT / "kernels" / "__init__.py"


def test_view_of_what_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no checkout of gpurnn"):
        check.make_view(tmp_path, tmp_path / "view")


def test_environment_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delenv("GPURNN_CACHE", raising=False)
    found = check.environment(tmp_path, tmp_path / "cache")
    assert found["PYTHONPATH"] == f"{tmp_path}{os.pathsep}elsewhere"
    assert found["GPURNN_CACHE"] == str(tmp_path / "cache")
    monkeypatch.setenv("GPURNN_CACHE", "mine")
    assert check.environment(tmp_path, tmp_path / "cache")["GPURNN_CACHE"] == "mine"


def test_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "sanitizer", lambda: "/opt/compute-sanitizer")
    parts = {p.name: p for p in check.parts_of(ROOT, tmp_path, tmp_path)}
    assert list(parts) == [
        *("import", "doctor", "tests", "memcheck", "racecheck"),
        *("probe", "soak", "group", "lm", "bench"),
    ]
    benchmarks = ("group", "lm", "bench")
    assert sum(p.limit for p in parts.values() if p.name not in benchmarks) < check.BUDGET < 600
    assert parts["soak"].limit <= 60
    for name in benchmarks:
        command = parts[name].command(200.0)
        assert command[command.index("--limit") + 1] == "150.0"
        assert command[-1] == str(tmp_path / f"{name}.json")
        assert parts[name].writes[0] == tmp_path / f"{name}.json"
    for name, grid in (("group", "group"), ("bench", "default")):
        command = parts[name].command(200.0)
        assert command[command.index("--grid") + 1] == grid
    assert parts["lm"].command(200.0)[3] == "lm"
    command = parts["soak"].command(60.0)
    assert command[-4:] == ["--soak", "9999", "--limit", "48.0"]
    assert parts["probe"].command(9.0)[-3:] == ["--probe", "--out", str(tmp_path / "tuned.json")]
    assert str(ROOT / "tests" / "test_gpu.py") in parts["tests"].command(60.0)
    for tool in ("memcheck", "racecheck"):
        command = parts[tool].command(60.0)
        assert command[:3] == ["/opt/compute-sanitizer", "--tool", tool]
        assert command[-1] == "--cases"
        assert parts[tool].judge(9) == ("failed", "compute-sanitizer found errors: see log.txt")
        assert parts[tool].judge(0) == ("passed", "")
    monkeypatch.setattr(check, "sanitizer", lambda: None)
    assert "compute-sanitizer was not found" in check.parts_of(ROOT, tmp_path, tmp_path)[3].skip


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def without(names: tuple[str, ...], folder: Path) -> dict[str, str]:
    """The environment of the parts, where some packages cannot be imported."""
    view = check.make_view(ROOT, folder / "view")
    (view / "sitecustomize.py").write_text(BLOCKED.format(names=names))
    found: dict[str, str] = check.environment(view, folder / "cache")
    return found


OPTIONAL = ("typer", "rich", "click", "pooch", "greenlet", "threadpoolctl", "xdist", "matplotlib")


def test_parts_run_without_what_they_do_not_need(tmp_path: Path) -> None:
    """The doctor, the benchmark's command, the tests' own set-up, the cases and the imports."""
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    env = without(OPTIONAL, tmp_path) | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}

    def outcome(words: list[str]) -> tuple[int, str]:
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    parts = {p.name: p for p in check.parts_of(ROOT, tmp_path, tmp_path)}
    _, told = outcome([*parts["doctor"].command(9.0), "--skip-checks"])
    failed = {f["name"] for f in json.loads(told)["findings"] if f["status"] == "failed"}
    assert failed <= {"pooch", "greenlet"}, told  # they are installed here, and cannot be found
    code, told = outcome(parts["bench"].command(90.0))
    assert code == 2 and "there is no GPU to use" in told
    for name in ("probe", "soak", "group", "lm"):
        code, told = outcome(parts[name].command(90.0))
        assert code == 2 and "there is no GPU to use" in told, name
    code, told = outcome([*parts["tests"].command(9.0), "--collect-only", "-q"])
    assert code == 0, told
    code, told = outcome([sys.executable, str(SCRIPT), "--cases"])
    assert code == check.NO_GPU, told
    _, told = outcome(parts["import"].command(9.0))
    found = json.loads(told)
    assert not set(OPTIONAL) & set(found["missing"])
    assert {"greenlet", "matplotlib"} <= set(found["without"])
    assert found["places"]["gpurnn"].startswith(str(tmp_path / "view"))


def test_what_is_needed_and_missing_is_named(tmp_path: Path) -> None:
    env = without(("cupy", "hypothesis"), tmp_path)
    part = next(p for p in check.parts_of(ROOT, tmp_path, tmp_path) if p.name == "import")
    with (tmp_path / "log").open("wb") as log:
        result = check.run_part(part, 60.0, tmp_path, env, log)
    assert result.outcome == "failed"
    assert "cupy: ModuleNotFoundError: No module named 'cupy'" in result.detail
    assert "hypothesis: ModuleNotFoundError" in result.detail


TIMES: dict[str, Any] = {"times_us": {}}


@pytest.mark.parametrize(
    ("rc", "records", "complete", "outcome", "told"),
    [
        (0, [], True, "failed", "0 of 3 measured; peers: no torch to compare with"),
        (
            0,
            [{**TIMES, "peers": {"torch": {"timed": "device"}}}] * 3,
            True,
            "passed",
            "3 of 3 measured; peers: torch 3 measured",
        ),
        (
            0,
            [{"per_second": {}, "peers": {"torch_graph_ieee": {"per_second": {}}}}],
            True,
            "passed",
            "1 of 3 measured; peers: torch_graph_ieee 1 measured",
        ),
        (
            0,
            [
                {**TIMES, "peers": {"torch": {"failed": "x"}, "cupy_loop": {}}},
                {**TIMES, "peers": {"torch": {"left_out": "x"}}},
                {"left_out": "the time limit was reached"},
            ],
            True,
            "passed",
            "2 of 3 measured, 1 left out; peers: cupy_loop 1 measured; "
            "torch 1 failed, 1 left out; no torch to compare with",
        ),
        (
            -15,
            [{**TIMES}, {"failed": "wrong"}],
            False,
            "failed",
            "1 of 3 measured, 1 failed; peers: no torch to compare with; "
            "it did not come to its end; exit code -15",
        ),
    ],
)
def test_benchmark_is_judged(
    tmp_path: Path, rc: int, records: Any, complete: bool, outcome: str, told: str
) -> None:
    out = tmp_path / "bench.json"
    nothing = f"nothing was measured, exit code {rc}: see log.txt"
    assert check.judge_bench(rc, out) == ("failed", nothing)
    out.write_text(json.dumps({"runs": 3, "complete": complete, "records": records}))
    assert check.judge_bench(rc, out) == (outcome, told)


def test_part_that_ran_out_of_time_says_how_far_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LEAST", 0.0)
    slow = part("slow", "import time; time.sleep(60)", 0.5, judge=lambda rc: ("failed", "1 of 9"))
    _, found = run(tmp_path, slow)
    assert found["parts"][0]["outcome"] == "timed out"
    assert found["parts"][0]["detail"] == "stopped after 0 seconds; 1 of 9"


@pytest.mark.parametrize(
    ("rc", "outcome", "told"),
    [
        (0, "passed", ""),
        (3, "skipped", "no GPU: no case was run"),
        (4, "failed", "a case gave wrong numbers: see log.txt"),
        (9, "failed", "compute-sanitizer found errors: see log.txt"),
        (1, "failed", "it crashed, exit code 1: see log.txt"),
        (-11, "failed", "it crashed, exit code -11: see log.txt"),
    ],
)
def test_cases_are_judged(rc: int, outcome: str, told: str) -> None:
    assert check.judge_cases(rc) == (outcome, told)


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ([("ok", "fine")], 0),
        ([("ok", "fine"), ("failed", "wrong numbers: H is off")], 4),
        ([("failed", "CUDADriverError: illegal address")], 1),
        ([], 1),
    ],
)
def test_exit_code_of_the_cases(monkeypatch: pytest.MonkeyPatch, details: Any, code: int) -> None:
    from gpurnn.doctor import Finding

    cuda = types.SimpleNamespace(set_allocator=lambda _: None)
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: None)
    monkeypatch.setattr("gpurnn.cuda.engines.cupy", lambda: types.SimpleNamespace(cuda=cuda))
    findings = [Finding("a case", *detail) for detail in details]
    monkeypatch.setattr("gpurnn.doctor.kernels.gpu_checks", lambda: iter(findings))
    assert check.main(["--cases"]) == code


def test_probes_are_judged(tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    assert check.judge_probe(1, out) == (
        "failed",
        "no table was written, exit code 1: see log.txt",
    )
    latencies = {"l2": 150.4, "flag": 350, "counter": [[2, 500]], "cluster": [[2, 110]]}
    out.write_text(json.dumps({"gpus": {"NVIDIA X": {"latencies_ns": latencies}}}))
    assert check.judge_probe(0, out) == (
        "passed",
        "NVIDIA X: l2 150 ns, flag 350 ns, cluster of 2 110 ns",
    )


@pytest.mark.parametrize(
    ("rc", "text", "outcome", "told"),
    [
        (0, "soak: 9 ran twice; 1 refused\n", "passed", "9 ran twice; 1 refused"),
        (0, "soak: 0 ran twice; 9 refused\n", "failed", "0 ran twice; 9 refused"),
        (1, "", "failed", "exit code 1: see log.txt"),
        (0, "", "failed", "exit code 0: see log.txt"),
    ],
)
def test_soak_is_judged(tmp_path: Path, rc: int, text: str, outcome: str, told: str) -> None:
    out = tmp_path / "soak.txt"
    out.write_text(text)
    assert check.judge_soak(rc, out) == (outcome, told)


def test_help_says_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--out", "--budget", "--only", "--cases", "memcheck", "summary.json"):
        assert word in done.stdout


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
def test_budget_is_checked(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main(["--budget", budget], parts=[])
    assert "expected seconds, above 0" in capsys.readouterr().err
