"""What is known of a GPU by measuring it: latencies, and which kernel was the fastest. Data only.

A table is a JSON file::

    {"gpus": {"NVIDIA H100 80GB HBM3": {
        "source": "gpurnn bench --probe", "measured": true, "clock_ghz": 1.98, "about": {…},
        "latencies_ns": {"launch": 2000, "l2": 150, "remote_shared": 103, "flag": 350,
            "counter": [[2, 500], [132, 700]], "cluster": [[2, 110], [4, 120]]},
        "choices": [{"dtype": "float32", "precision": "ieee", "n": [1, 64], "h": [256, 640],
            "kernel": "group", "blocks": 8, "exchange": "cluster", "rows": 4}]}}}

An entry is found by the GPU's name, as the driver gives it: the one of just that name, else the
longest one that the name begins with. Ranges are inclusive, and the first choice that fits wins; it
may leave out blocks, exchange and rows, which the plan then chooses. Either of "latencies_ns" and
"choices" may be missing.

The package's own table (``gpurnn/tuned.json``) holds estimates, for a GPU that it does not name
those of "any", at the GPU's clock. A file that the environment variable ``GPURNN_TUNED`` names goes
before it. Both are read, and checked as a whole, once in a process, when a plan first asks; plans
are kept as well. So neither another file nor a change of it is seen later.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gpurnn.files import write_atomically

__all__ = ["CLUSTERS", "Choice", "Latencies", "Rule", "choice", "latencies", "source", "write"]

VARIABLE = "GPURNN_TUNED"
ANY = "any"
CLUSTERS = (2, 4, 8, 16)
KERNELS = ("step", "resident", "group", "gemm")  # "concatenated" does not take ids
IEEE_ONLY = ("step", "resident", "concatenated")
EXCHANGES = ("cluster", "flags", "counter")
DTYPES = ("float32", "float64", "float16", "bfloat16")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class Latencies:
    """Nanoseconds that things take which a group of blocks does in each step.

    Attributes:
        launch: of a kernel, where launches are queued back to back.
        l2: a load that the L2 cache serves, and that depends on the load before.
        remote_shared: the same from the shared memory of another block of the cluster.
        flag: from a block's store of a flagged 64-bit word until another block's poll sees it.
        counter: (blocks, ns), …: a barrier of so many blocks through a counter in global memory.
        cluster: (size, ns), …: a barrier of a cluster of 2, 4, 8 and 16 blocks.
        measured: on this GPU; else they are estimates.
    """

    launch: float
    l2: float
    remote_shared: float
    flag: float
    counter: tuple[tuple[int, float], ...]
    cluster: tuple[tuple[int, float], ...]
    measured: bool


@dataclass(frozen=True)
class Choice:
    """A kernel by name; of "group" also its sizes, where they are not left to the plan."""

    kernel: str
    blocks: int | None = None
    exchange: str | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Rule:
    """A choice, and where it holds: ``n`` rows of the batch and ``h`` units, from and to."""

    dtype: str
    precision: str
    n: tuple[int, int]
    h: tuple[int, int]
    choice: Choice

    def fits(self, dtype: str, precision: str, n: int, h: int) -> bool:
        """Whether it holds here."""
        return (
            (self.dtype, self.precision) == (dtype, precision)
            and self.n[0] <= n <= self.n[1]
            and self.h[0] <= h <= self.h[1]
        )


@dataclass(frozen=True)
class Entry:
    """What a table says of a GPU; ``given`` is that as it stands there."""

    source: str
    clock_ghz: float | None
    latencies: Latencies | None
    rules: tuple[Rule, ...]
    given: Mapping[str, Any]


Table = Mapping[str, Entry]


def latencies(name: str, clock_ghz: float) -> Latencies:
    """Return a GPU's latencies: measured ones of the user's table, else estimates.

    Sizes of clusters that the entry leaves out are taken from the estimate for any GPU.

    Raises:
        ValueError: the file that ``GPURNN_TUNED`` names cannot be read, or is no such table; the
            message names file, key, what came and what was expected.
    """
    whatever = _at_clock(_built_in()[ANY], clock_ghz)
    for entry in _entries(name):
        if entry.latencies is not None:
            known = dict(whatever.cluster) | dict(entry.latencies.cluster)
            return replace(entry.latencies, cluster=tuple(sorted(known.items())))
    return whatever


def choice(name: str, *, dtype: str, precision: str, n: int, h: int) -> Choice | None:
    """Return what a table says should run n rows of h units, if it says anything.

    Raises:
        ValueError: as ``latencies`` does.
    """
    for entry in _entries(name):
        for rule in entry.rules:
            if rule.fits(dtype, precision, n, h):
                return rule.choice
    return None


def source(name: str) -> str:
    """Return where a GPU's latencies come from, in words.

    Raises:
        ValueError: as ``latencies`` does.
    """
    found = (entry.source for entry in _entries(name) if entry.latencies is not None)
    return next(found, _built_in()[ANY].source)


def write(
    path: str | os.PathLike[str],
    name: str,
    latencies: Latencies,
    choices: Sequence[Rule] | None = None,
    *,
    source: str = "gpurnn bench --probe",
    clock_ghz: float | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a GPU's entry into a table, which need not exist; other GPUs' entries stay.

    Args:
        path: the file, which is replaced as a whole or not at all.
        name: the GPU's, as the driver gives it.
        latencies: nanoseconds.
        choices: in their order; None leaves those that the file has.
        source: where all this comes from, in words.
        clock_ghz: of the GPU while it was measured.
        about: whatever else should be known: GPU, driver, versions, commit.

    Raises:
        ValueError: there is a file, and it is no such table, or an argument would make it none.
        OSError: the file cannot be read or written.
    """
    file = Path(path)
    gpus: dict[str, Any] = {}
    if file.exists():
        gpus = {known: dict(entry.given) for known, entry in _table(file.read_text(), file).items()}
    found = asdict(latencies)
    entry: dict[str, Any] = {"source": source, "measured": found.pop("measured")}
    if clock_ghz is not None:
        entry["clock_ghz"] = clock_ghz
    if about is not None:
        entry["about"] = dict(about)
    entry["latencies_ns"] = found
    if choices is not None:
        entry["choices"] = [_as_given(rule) for rule in choices]
    elif "choices" in gpus.get(name, {}):
        entry["choices"] = gpus[name]["choices"]
    content = json.dumps({"gpus": gpus | {name: entry}}, indent=2, allow_nan=False) + "\n"
    _table(content, file)
    write_atomically(file, content.encode())


def _as_given(rule: Rule) -> dict[str, Any]:
    where = {"dtype": rule.dtype, "precision": rule.precision, "n": rule.n, "h": rule.h}
    return where | {name: value for name, value in vars(rule.choice).items() if value is not None}


def _entries(name: str) -> Iterator[Entry]:
    """Yield what tables say of a GPU, the user's first."""
    for table in (_users(), _built_in()):
        fitting = [known for known in table if known != ANY and name.startswith(known)]
        if fitting:
            yield table[max(fitting, key=len)]


def _at_clock(entry: Entry, clock_ghz: float) -> Latencies:
    known = entry.latencies
    if known is None or entry.clock_ghz is None:
        raise ValueError(f"gpurnn/tuned.json: gpus.{ANY} lacks its latencies_ns or its clock_ghz")
    factor = entry.clock_ghz / clock_ghz

    def scaled(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((at, ns * factor) for at, ns in points)

    return Latencies(
        launch=known.launch,  # the host's
        l2=known.l2 * factor,
        remote_shared=known.remote_shared * factor,
        flag=known.flag * factor,
        counter=scaled(known.counter),
        cluster=scaled(known.cluster),
        measured=known.measured,
    )


@cache
def _built_in() -> Table:
    file = resources.files("gpurnn") / "tuned.json"
    return _table(file.read_text(encoding="utf-8"), "gpurnn/tuned.json")


@cache
def _users() -> Table:
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ValueError(f"{VARIABLE} is {path}, which cannot be read: {reason}") from e
    return _table(text, path)


# ---------------------------------------------------------------------------------------
# From JSON, checked
# ---------------------------------------------------------------------------------------


class _Given:
    """A value of a file, and the way to it, for what there is to say about it."""

    def __init__(self, value: Any, file: object, at: str = "") -> None:
        self.value, self.file, self.at = value, file, at

    def refuse(self, expected: str) -> ValueError:
        where = f"{self.file}: {self.at or 'the whole'}"
        return ValueError(f"{where} is {self.value!r}: expected {expected}")

    def of(self, kind: type, expected: str) -> Any:
        if not isinstance(self.value, kind) or isinstance(self.value, bool) is not (kind is bool):
            raise self.refuse(expected)
        return self.value

    def fields(self, needed: Sequence[str], others: Sequence[str] = ()) -> "dict[str, _Given]":
        found = self.of(dict, f"an object with {', '.join(needed) or ', '.join(others)}")
        for key in found:
            if key not in needed and key not in others:
                raise ValueError(
                    f"{self.file}: {self._of(key)} is not known: expected one of "
                    f"{', '.join((*needed, *others))}"
                )
        for key in needed:
            if key not in found:
                raise ValueError(f"{self.file}: {self._of(key)} is missing")
        return {key: self.at_key(key) for key in found}

    def at_key(self, key: str) -> "_Given":
        return _Given(self.value[key], self.file, self._of(key))

    def items(self, expected: str) -> "list[_Given]":
        found = self.of(list, expected)
        return [_Given(v, self.file, f"{self.at}[{i}]") for i, v in enumerate(found)]

    def number(self, unit: str) -> float:
        expected = f"a number of {unit} above 0"
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(expected)
        if not (value > 0 and math.isfinite(value)):
            raise self.refuse(expected)
        return float(value)

    def integer(self, least: int) -> int:
        value = self.of(int, f"an integer of at least {least}")
        if value < least:
            raise self.refuse(f"an integer of at least {least}")
        return int(value)

    def one_of(self, names: Sequence[str]) -> str:
        if self.value not in names:
            raise self.refuse(f"one of {', '.join(names)}")
        return str(self.value)

    def pair(self, expected: str) -> "tuple[_Given, _Given]":
        items = self.items(expected)
        if len(items) != 2:
            raise self.refuse(expected)
        return items[0], items[1]

    def range(self) -> tuple[int, int]:
        low, high = (end.integer(0) for end in self.pair("[from, to], inclusive"))
        if low > high:
            raise self.refuse("[from, to], inclusive, from not above to")
        return low, high

    def points(self, expected: str, at: "Callable[[_Given], int]") -> tuple[tuple[int, float], ...]:
        found = []
        for item in self.items(expected):
            first, second = item.pair(expected)
            found.append((at(first), second.number("nanoseconds")))
        places = [place for place, _ in found]
        if places != sorted(set(places)):
            raise self.refuse(f"{expected}, in ascending order")
        return tuple(found)

    def _of(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key


def _table(text: str, file: object) -> Table:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: no JSON ({e})") from e
    gpus = _Given(content, file).fields(("gpus",))["gpus"]
    names = gpus.of(dict, "an object of GPUs by name")
    return {name: _entry(gpus.at_key(name)) for name in names}


def _entry(given: _Given) -> Entry:
    entry = given.fields(("source", "measured"), ("clock_ghz", "about", "latencies_ns", "choices"))
    measured = entry["measured"].of(bool, "true or false")
    if "about" in entry:
        entry["about"].of(dict, "an object")
    return Entry(
        source=entry["source"].of(str, "a string: where this comes from"),
        clock_ghz=entry["clock_ghz"].number("GHz") if "clock_ghz" in entry else None,
        latencies=_latencies(entry["latencies_ns"], measured) if "latencies_ns" in entry else None,
        rules=(
            tuple(_rule(item) for item in entry["choices"].items("a list of choices"))
            if "choices" in entry
            else ()
        ),
        given=given.value,
    )


def _latencies(given: _Given, measured: bool) -> Latencies:
    single = ("launch", "l2", "remote_shared", "flag")
    fields = given.fields((*single, "counter", "cluster"))
    counter = fields["counter"].points("[[blocks, ns], …]", lambda at: at.integer(1))
    if not counter:
        raise fields["counter"].refuse("[[blocks, ns], …], one at least")

    def size(at: _Given) -> int:
        if at.integer(1) not in CLUSTERS:
            raise at.refuse(f"one of {', '.join(map(str, CLUSTERS))}")
        return int(at.value)

    return Latencies(
        **{name: fields[name].number("nanoseconds") for name in single},
        counter=counter,
        cluster=fields["cluster"].points("[[size, ns], …]", size),
        measured=measured,
    )


def _rule(given: _Given) -> Rule:
    of_group = ("blocks", "exchange", "rows")
    fields = given.fields(("dtype", "precision", "n", "h", "kernel"), of_group)
    kernel = fields["kernel"].one_of(KERNELS)
    dtype = fields["dtype"].one_of(DTYPES)
    precision = fields["precision"].one_of(PRECISIONS)
    if precision == "tf32" and (dtype != "float32" or kernel in IEEE_ONLY):
        raise fields["precision"].refuse(
            f"'ieee' with dtype {dtype} and kernel {kernel!r}, which know no other"
        )
    for name in of_group:
        if kernel != "group" and name in fields:
            raise fields[name].refuse(f"nothing: kernel {kernel!r} has no {name}")
    return Rule(
        dtype=dtype,
        precision=precision,
        n=fields["n"].range(),
        h=fields["h"].range(),
        choice=Choice(
            kernel,
            fields["blocks"].integer(2) if "blocks" in fields else None,
            fields["exchange"].one_of(EXCHANGES) if "exchange" in fields else None,
            fields["rows"].integer(1) if "rows" in fields else None,
        ),
    )
