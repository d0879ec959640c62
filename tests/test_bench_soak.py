"""The soak, in the emulator: what is drawn, what is found, and what the command says of it."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpurnn import bench, emulated, planning
from gpurnn import functional as F
from gpurnn.bench import __main__ as bench_module
from gpurnn.bench import ahead, command, soak
from gpurnn.bench.soak import LARGE, SMALL, SMALL_CARD, Configuration, SoakError, Trial
from gpurnn.cli import app
from gpurnn.cuda.engines import current_emulation
from gpurnn.planning import Group

pytest.importorskip("greenlet", reason="the emulator needs greenlet")
pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")

H100 = planning.DEVICES["H100"]
STEP = Configuration(2, 3, "float32", "ieee", "tanh", "step")


@pytest.fixture
def engine() -> Iterator[Any]:
    with emulated(SMALL_CARD, seed=0):
        yield current_emulation()


def run(engine: Any, count: int, *pool: Configuration, **options: Any) -> list[soak.Outcome]:
    options.setdefault("every", 1)
    return list(soak.run_soak(count, engine=engine, sizes=SMALL, pool=pool, **options))


def test_a_dozen(engine: Any) -> None:
    """Every exchange, and every kernel, runs twice with the same bits and as the reference does."""
    pool = [
        Configuration(2, 7, "float32", "ieee", "tanh", Group(2, exchange, rows))
        for exchange in planning.EXCHANGES
        for rows in (1, None)
    ]
    pool += [
        dataclasses.replace(STEP, kernel=kernel, dtype=dtype, activation=activation)
        for kernel, dtype, activation in (
            ("step", "float64", "relu"),
            ("resident", "float16", "softplus"),
            ("concatenated", "bfloat16", "sigmoid"),
        )
    ]
    outcomes = run(engine, 12, *pool)
    assert len(outcomes) == 12
    assert all(outcome.checked and not outcome.refused for outcome in outcomes)
    ran = {outcome.trial.configuration.kernel for outcome in outcomes}
    assert len(ran) >= 5, "of nine"
    assert {outcome.trial.ids for outcome in outcomes} == {True, False}


def test_what_is_drawn_follows_from_seed_and_index() -> None:
    pool = soak.configurations(3, 40)
    assert pool == soak.configurations(3, 40) != soak.configurations(4, 40)
    assert pool[:10] == soak.configurations(3, 10), "whatever their number"
    assert soak.trial(3, 5, pool) == soak.trial(3, 5, pool)
    trials = [soak.trial(3, index, pool) for index in range(300)]
    assert len({str(t) for t in trials}) == 300
    for t in trials:
        c = t.configuration
        assert 1 <= t.T <= LARGE.T and 1 <= t.d <= LARGE.d
        assert 1 <= c.n <= LARGE.n and 1 <= c.h <= LARGE.h
        assert t.T == 1 or t.T * c.n * c.h <= LARGE.elements
        assert not (t.ids and c.kernel == "concatenated")


def test_all_that_there_is_comes_up() -> None:
    pool = soak.configurations(0, 256)
    assert {c.dtype for c in pool} == set(planning.DTYPES)
    assert {c.precision for c in pool} == set(planning.PRECISIONS)
    assert {c.activation for c in pool} == set(soak.ACTIVATIONS)
    names = {c.kernel for c in pool if not isinstance(c.kernel, Group)}
    assert names == {None, *planning.KERNELS}
    groups = [c.kernel for c in pool if isinstance(c.kernel, Group)]
    assert {g.exchange for g in groups} == {None, *planning.EXCHANGES}
    assert {g.blocks for g in groups} > {2, 3, 16}
    assert max(c.h for c in pool) > 1500 and max(c.n for c in pool) > 100
    ran = [c for c in pool if not c.refusal(H100)]
    assert len(pool) / 4 < len(ran) < len(pool), "some are refused, and not too many"
    only = {c.kernel for c in soak.configurations(0, 30, "resident")}
    assert only == {"resident"}


def test_what_plan_refuses_is_counted(engine: Any) -> None:
    refused = dataclasses.replace(STEP, dtype="float64", kernel=Group(2))
    outcomes = run(engine, 6, refused, STEP)
    told = {outcome.refused for outcome in outcomes}
    assert len(told) == 2 and "" in told
    assert any("dtype is float64: expected float32" in why for why in told)
    assert all(outcome.checked != bool(outcome.refused) for outcome in outcomes)


def test_how_often_the_reference_is_asked(engine: Any) -> None:
    outcomes = run(engine, 5, STEP, every=3)
    assert [outcome.checked for outcome in outcomes] == [True, False, False, True, False]


def test_a_limit(engine: Any) -> None:
    assert run(engine, 5, STEP, limit=-1.0) == []


def test_results_that_differ_are_found(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, calls = F.rnn_backward, []

    def differs(dH: Any, residuals: Any) -> Any:
        calls.append(1)
        dX, dh_0, *rest = backward(dH, residuals)
        if len(calls) == 4:
            dh_0 = -dh_0 if dh_0.any() else dh_0 + 1
        return (dX, dh_0, *rest)

    monkeypatch.setattr(soak.F, "rnn_backward", differs)
    with pytest.raises(
        SoakError, match=r"^T \d, n 2, .* kernel step; seed 7, index 1: dh_0 differ"
    ):
        run(engine, 3, STEP, seed=7)


def test_a_wrong_result_is_found(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = F.rnn_backward

    def wrong(dH: Any, residuals: Any) -> Any:
        dX, dh_0, dW_xh, dW_hh, db_h = backward(dH, residuals)
        return dX, dh_0, dW_xh, dW_hh + np.float32(0.01), db_h

    monkeypatch.setattr(soak.F, "rnn_backward", wrong)
    with pytest.raises(SoakError, match=r"index 0: dW_hh is off the reference by 0\.03, expected"):
        run(engine, 1, STEP)


def test_nan_is_wrong(engine: Any) -> None:
    zero = np.zeros((1, 1, 1))
    drawn = Trial(0, 0, dataclasses.replace(STEP, n=1, h=1), 1, 1, False)
    arguments, dH = soak._numbers(drawn)
    found = [zero * np.nan] * 6
    with pytest.raises(SoakError, match="H is off the reference by nan"):
        soak._compare(drawn, found, arguments, dH)


def test_whatever_fails_says_in_which_trial(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a group kernel gave up")

    monkeypatch.setattr(soak.F, "rnn_forward", gives_up)
    with pytest.raises(SoakError, match=r"seed 0, index 0: RuntimeError: a group kernel gave up"):
        run(engine, 1, STEP)


def test_a_report_is_that_of_its_trial(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def reports(_: Any) -> None:
        raise RuntimeError("block 3 waited in vain")

    monkeypatch.setattr(type(engine), "check_reports", reports)
    with pytest.raises(SoakError, match=r"seed 0, index 0: RuntimeError: block 3 waited in vain"):
        run(engine, 1, STEP)


def test_kernels_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ahead, "limits_of", lambda _: H100)
    monkeypatch.setattr(ahead, "cupy", Device)
    monkeypatch.setattr(ahead, "compile_ahead", lambda specs, *_, **__: seen.extend(specs) or [])
    assert ahead.compile_soak(500, 0, "group") == []
    pool = [c for c in soak.configurations(0, 32, "group") if not c.refusal(H100)]
    assert len(seen) == 3 * len(pool)
    assert {spec.kind for spec in seen[2::3]} == {"column_sums"}  # of a bias
    for c, forward in zip(pool, seen[::3], strict=True):
        plan = c.plan(H100)
        assert (forward.kind, forward.sizes) == ("group_forward", plan.tile)
        assert (forward.exchange, forward.activation) == (plan.exchange, c.activation)


class Device:
    """What ``ahead`` asks CuPy for."""

    id = 0

    @property
    def cuda(self) -> Any:
        return self

    def Device(self) -> Any:
        return self


@pytest.fixture
def bench_command() -> Callable[..., Any]:
    return lambda *options: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *options])


def test_command(bench_command: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--soak", "12", "--device", "emulator", "--kernel", "resident", "--seed", "2"]
    done = bench_command(*options)
    assert done.exit_code == 0, done.output
    told = re.search(
        r"^soak: (\d+) ran twice with the same bits, (\d+) of them compared with the "
        r"reference; (\d+) refused by plan\(\)$",
        done.stdout.strip(),
    )
    assert told is not None, done.output
    ran, compared, refused = map(int, told.groups())
    assert ran == compared > 6 and ran + refused == 12
    assert bench_module.main([*options[:1], "2", *options[2:]]) == 0
    assert " ran twice with the same bits, " in capsys.readouterr().out


def test_command_stops_at_the_first_failure(
    bench_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "_same_bits", lambda a, b: False)
    options = ("--soak", "3", "--device", "emulator", "--kernel", "step", "--seed", "5")
    done = bench_command(*options)
    assert done.exit_code == 1
    assert "error: T " in done.stderr
    told = r"kernel step; seed 5, index \d: H differs from one run to the next"
    assert re.search(told, done.stderr), done.stderr
    assert bench_module.main(list(options)) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--soak 0", "soak is 0: expected at least 1"),
        ("--soak 1 --seed -1", "seed is -1: expected at least 0"),
        ("--soak 1 --kernel fast", "kernel is 'fast': expected one of step, resident"),
        ("--soak 1 --device cpu", "device is 'cpu': expected one of auto, cuda, emulator"),
        ("--soak 1 --limit 0", "limit is 0.0: expected a finite number above 0"),
        ("--soak 1", "there is no GPU to use: the driver sees no device"),
        ("--grid fast --device cuda", "there is no GPU to use"),
        ("--soak 1 --out x.json", "out is x.json: expected nothing, beside --soak"),
        ("--soak 1 --probe", "probe is True: expected nothing, beside --soak"),
        ("--soak 1 --seconds 3", "seconds is 3.0: expected nothing, beside --soak"),
        ("--probe --grid group", "grid is group: expected nothing, beside --probe"),
        ("--kernel step", "kernel is 'step': expected it beside --soak alone"),
        ("--grid fast --device cpu", "grid is 'fast': expected one of default, group, all"),
    ],
)
def test_mistakes(
    bench_command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    told: str,
) -> None:
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: "the driver sees no device")
    done = bench_command(*options.split())
    assert (done.exit_code, told in done.stderr) == (2, True), done.output
    with pytest.raises(SystemExit, match="2"):
        bench_module.main(options.split())
    assert told in capsys.readouterr().err


def test_on_a_gpu_what_is_soaked_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = command.AskedSoak("cuda", 4, 1, "group", 30.0)
    seen: dict[str, Any] = {}

    def compiles(count: int, seed: int, kernel: str, *, limit: float) -> list[str]:
        seen["ahead"] = (count, seed, kernel, limit)
        return ["group_forward: KeyError"]

    def soaks(count: int, **options: Any) -> Iterator[soak.Outcome]:
        seen["run"] = (count, options)
        for index in range(count):
            drawn = soak.trial(1, index, [STEP])
            yield soak.Outcome(drawn, "no" if index == 2 else "", index == 0)

    monkeypatch.setattr(bench, "compile_soak", compiles)
    monkeypatch.setattr(bench, "run_soak", soaks)
    notes: list[str] = []
    found = command.soak(asked, notes.append, lambda _: None)
    assert (found.ran, found.refused, found.compared) == (3, 1, 1)
    assert seen["ahead"] == (4, 1, "group", 30.0)
    count, options = seen["run"]
    assert count == 4 and options["seed"] == 1 and options["kernel"] == "group"
    assert 0 < options["limit"] <= 30
    assert notes == ["could not be compiled ahead: group_forward: KeyError"]
