"""The tables of latencies and choices: what they hold, what is refused, what plan() makes of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gpurnn
from gpurnn import planning, tuned
from gpurnn.planning import choose, group
from gpurnn.tuned import Choice, Latencies, Rule

CACHED = (tuned._users, tuned._built_in, choose._plan, group.group_plans)

LATENCIES = Latencies(1900.0, 140.0, 99.0, 310.0, ((2, 410.0), (8, 500.0)), ((2, 95.0),), True)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """What writes a table and makes it the user's."""

    def use(content: Any) -> Path:
        path = tmp_path / "tuned.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("GPURNN_TUNED", str(path))
        for cached in CACHED:
            cached.cache_clear()
        return path

    return use


def entry(**changes: Any) -> dict[str, Any]:
    latencies = {"launch": 1, "l2": 2, "remote_shared": 3, "flag": 4}
    latencies |= {"counter": [[2, 5], [8, 6]], "cluster": [[2, 7]]}  # type: ignore[dict-item]
    found = {"source": "a test", "measured": True, "latencies_ns": latencies, "choices": []}
    return {k: v for k, v in (found | changes).items() if v is not None}


def rule(**changes: Any) -> dict[str, Any]:
    found = {"dtype": "float32", "precision": "ieee", "n": [1, 64], "h": [256, 640]}
    found |= {"kernel": "group", "blocks": 8, "exchange": "flags", "rows": 4}
    return {k: v for k, v in (found | changes).items() if v is not None}


def test_estimates_of_the_package() -> None:
    """As published for the H100 at 1.755 GHz: L2 263 cycles, distributed shared memory 180."""
    found = tuned.latencies(H100, 1.98)
    assert not found.measured
    assert found.l2 == pytest.approx(263 / 1.755, rel=0.01)
    assert found.remote_shared == pytest.approx(180 / 1.755, rel=0.01)
    assert 2 * found.l2 < found.flag < 3 * found.l2
    assert all(3 * found.l2 <= ns <= 5 * found.l2 for _, ns in found.counter)
    assert [size for size, _ in found.cluster] == [2, 4, 8, 16]
    assert [ns for _, ns in found.cluster] == sorted(ns for _, ns in found.cluster)
    assert "published" in tuned.source(H100)
    assert tuned.choice(H100, dtype="float32", precision="ieee", n=8, h=512) is None


def test_an_unknown_gpu_is_estimated_by_its_clock() -> None:
    fast, slow = (tuned.latencies("a GPU of tomorrow", clock) for clock in (3.51, 1.755))
    assert (fast.l2, fast.flag) == (slow.l2 / 2, slow.flag / 2)
    assert fast.cluster == tuple((size, ns / 2) for size, ns in slow.cluster)
    assert fast.launch == slow.launch, "the host's"
    assert "any" not in tuned.source("a GPU of tomorrow")


def test_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    rules = [
        Rule("float32", "ieee", (1, 4), (512, 512), Choice("group", 8, "cluster", 1)),
        Rule("float32", "ieee", (1, 64), (256, 1024), Choice("step")),
    ]
    about = {"driver": "600.1"}
    tuned.write(path, H100, LATENCIES, rules, clock_ghz=1.98, about=about)
    tuned.write(path, "another", LATENCIES)
    monkeypatch.setenv("GPURNN_TUNED", str(path))
    found = tuned.latencies(H100, 1.98)
    assert (found.l2, found.counter, found.measured) == (140.0, LATENCIES.counter, True)
    assert found.cluster[0] == (2, 95.0) and len(found.cluster) == 4, "others are estimated"

    def chosen(n: int, h: int, **other: str) -> Choice | None:
        asked = {"dtype": "float32", "precision": "ieee"} | other
        return tuned.choice(H100, **asked, n=n, h=h)  # type: ignore[arg-type]

    assert chosen(4, 512) == Choice("group", 8, "cluster", 1), "the first that fits"
    assert chosen(5, 512) == chosen(64, 1024) == chosen(1, 256) == Choice("step")
    assert chosen(65, 512) is chosen(1, 255) is chosen(1, 1025) is chosen(0, 512) is None
    assert chosen(4, 512, dtype="float16") is chosen(4, 512, precision="tf32") is None
    kept = json.loads(path.read_text())["gpus"]
    assert set(kept) == {H100, "another"} and kept[H100]["about"] == about
    tuned.write(path, H100, LATENCIES)
    assert len(json.loads(path.read_text())["gpus"][H100]["choices"]) == 2, "None leaves them"
    tuned.write(path, H100, LATENCIES, [])
    assert json.loads(path.read_text())["gpus"][H100]["choices"] == []


def test_what_would_be_no_table_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"mine\.json: the whole is \[\]: expected an object"):
        tuned.write(path, H100, LATENCIES)
    path.unlink()
    impossible = Rule("float32", "ieee", (4, 1), (1, 2), Choice("step"))
    with pytest.raises(ValueError, match=r"choices\[0\]\.n is \[4, 1\]: .* from not above to"):
        tuned.write(path, H100, LATENCIES, [impossible])
    assert not path.exists()


def test_names(table: Callable[[Any], Path]) -> None:
    """Just the name, else the longest that it begins with; the user's table first."""
    gpus = {
        "NVIDIA": entry(source="short"),
        "NVIDIA H100": entry(source="longer"),
        H100: entry(source="exact"),
        "NVIDIA H200": entry(latencies_ns=None),
    }
    table({"gpus": gpus})
    assert tuned.source(H100) == "exact"
    assert tuned.source("NVIDIA H100 PCIe") == "longer"
    assert tuned.source("NVIDIA A100") == "short"
    assert "as for the H100" in tuned.source("NVIDIA H200"), "where the user's says nothing"
    assert "no other entry names" in tuned.source("AMD")


LATENCY = "gpus.G.latencies_ns"
REFUSED = [
    ("{", "no JSON"),
    ({}, "gpus is missing"),
    ({"gpus": []}, "gpus is []: expected an object of GPUs by name"),
    ({"gpus": {}, "cpus": 1}, "cpus is not known: expected one of gpus"),
    (entry(measured="yes"), "gpus.G.measured is 'yes': expected true or false"),
    (entry(measured=1), "gpus.G.measured is 1: expected true or false"),
    (entry(source=None), "gpus.G.source is missing"),
    (entry(clock_ghz=0), "gpus.G.clock_ghz is 0: expected a number of GHz above 0"),
    (entry(about=[]), "gpus.G.about is []: expected an object"),
    (entry(latencies_ns={}), f"{LATENCY}.launch is missing"),
    (entry(choices=[rule(kernel="fast")]), "choices[0].kernel is 'fast': expected one of step, "),
    (entry(choices=[rule(dtype="int8")]), "choices[0].dtype is 'int8': expected one of float32"),
    (entry(choices=[rule(n=4)]), "choices[0].n is 4: expected [from, to], inclusive"),
    (entry(choices=[rule(h=[1, 2, 3])]), "choices[0].h is [1, 2, 3]: expected [from, to]"),
    (entry(choices=[rule(blocks=1)]), "choices[0].blocks is 1: expected an integer of at least 2"),
    (entry(choices=[rule(rows=True)]), "choices[0].rows is True: expected an integer of at least"),
    (entry(choices=[rule(exchange="tcp")]), "choices[0].exchange is 'tcp': expected one of clus"),
    (entry(choices=[rule(), rule(kernel="step")]), "choices[1].blocks is 8: expected nothing"),
    (entry(choices=[rule(n=None)]), "choices[0].n is missing"),
    (
        entry(choices=[rule(precision="tf32", dtype="float16")]),
        "choices[0].precision is 'tf32': expected 'ieee' with dtype float16 and kernel 'group'",
    ),
]


@pytest.mark.parametrize(("content", "told"), REFUSED, ids=range(len(REFUSED)))
def test_a_malformed_table_is_refused(
    table: Callable[[Any], Path], content: Any, told: str
) -> None:
    """Whoever asks, whatever for: it is checked as a whole."""
    path = table(
        {"gpus": {"G": content}} if "source" in content or "measured" in content else content
    )
    for ask in (
        lambda: tuned.latencies("nothing of this name", 1.0),
        lambda: gpurnn.plan(T=1, n=1, d=1, h=400, device="H100"),
    ):
        with pytest.raises(ValueError) as error:
            ask()
        assert str(error.value).startswith(f"{path}: ")
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("l2", "fast", "l2 is 'fast': expected a number of nanoseconds above 0"),
        ("flag", -1, "flag is -1: expected"),
        ("launch", True, "launch is True: expected"),
        ("l3", 4, "l3 is not known: expected one of launch, l2, remote_shared, flag, counter"),
        ("counter", [], "counter is []: expected [[blocks, ns], …], one at least"),
        ("counter", [[8, 1], [2, 1]], "[[8, 1], [2, 1]]: expected [[blocks, ns], …], in ascending"),
        ("counter", [[2]], "counter[0] is [2]: expected [[blocks, ns], …]"),
        ("cluster", [[3, 1]], "cluster[0][0] is 3: expected one of 2, 4, 8, 16"),
        ("cluster", 5, "cluster is 5: expected [[size, ns], …]"),
    ],
)
def test_a_latency_that_is_none(
    table: Callable[[Any], Path], key: str, value: Any, told: str
) -> None:
    given = entry()
    given["latencies_ns"][key] = value
    path = table({"gpus": {"G": given}})
    with pytest.raises(ValueError) as error:
        tuned.latencies("G", 1.0)
    assert str(error.value).startswith(f"{path}: {LATENCY}.")
    assert told in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPURNN_TUNED", str(tmp_path / "no.json"))
    with pytest.raises(ValueError, match=r"^GPURNN_TUNED is .*no\.json, which cannot be read: No"):
        tuned.latencies(H100, 1.98)


def test_a_choice_changes_the_plan_which_says_so(table: Callable[[Any], Path]) -> None:
    shape = {"T": 10, "n": 2, "d": 1, "h": 300}
    table(
        {
            "gpus": {
                "NVIDIA": entry(
                    choices=[rule(kernel="step", blocks=None, exchange=None, rows=None)]
                )
            }
        }
    )
    plan = gpurnn.plan(**shape, device="H100")  # type: ignore[arg-type]
    assert plan.kernel == "step"
    assert "measured on this GPU, by its table" in plan.why[0]
    assert "measured on this GPU, by its table" in str(plan)
    other = gpurnn.plan(**shape | {"h": 700}, device="H100")  # type: ignore[arg-type]
    assert other.kernel != "step", "outside its range the model chooses"
    table({"gpus": {"NVIDIA": entry(choices=[rule(blocks=12, rows=1)])}})
    plan = gpurnn.plan(**shape, device="H100")  # type: ignore[arg-type]
    assert (plan.kernel, plan.exchange, plan.tile.blocks) == ("group", "flags", 12)  # type: ignore[union-attr]
    named = gpurnn.plan(**shape, device="H100", kernel="step")  # type: ignore[arg-type]
    assert named.kernel == "step", "what the caller names goes before the table"


def test_an_impossible_choice_is_an_error_that_names_the_table(
    table: Callable[[Any], Path],
) -> None:
    table({"gpus": {"NVIDIA": entry(choices=[rule(blocks=200, exchange="cluster")])}})
    with pytest.raises(ValueError) as error:
        gpurnn.plan(T=10, n=2, d=1, h=300, device="H100")
    told = str(error.value)
    assert told.startswith("the table of measured choices names for NVIDIA H100, n = 2, h = 300")
    assert "blocks is 200 and clusters of NVIDIA H100 have 2, 4, 8, 16 blocks" in told


def test_latencies_of_the_table_reach_the_model(table: Callable[[Any], Path]) -> None:
    wish = {"T": 10, "n": 2, "d": 1, "h": 512, "device": "H100"}
    before = gpurnn.plan(**wish, kernel=planning.Group(8, "flags"))  # type: ignore[arg-type]
    given = entry()
    given["latencies_ns"]["flag"] = 99_000
    table({"gpus": {"NVIDIA H100": given}})
    after = gpurnn.plan(**wish, kernel=planning.Group(8, "flags"))  # type: ignore[arg-type]
    assert after.why != before.why
    assert any("about 9" in reason for reason in after.why), "99 µs a step and more"


def test_names_are_those_of_plan() -> None:
    assert {*tuned.KERNELS, "concatenated"} == set(planning.KERNELS)
    assert tuned.IEEE_ONLY == choose.IEEE_ONLY
    assert tuned.EXCHANGES == planning.EXCHANGES
    assert tuned.DTYPES == planning.DTYPES
    assert tuned.PRECISIONS == planning.PRECISIONS
