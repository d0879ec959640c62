"""Whole generations in one launch, under the emulator, against NumPy's token by token."""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from group_setup import EXCHANGES
from language_model_setup import ALPHABET, language, set_params

import gpurnn
from gpurnn import LanguageModel, Tokenizer, Vocabulary, planning, validate
from gpurnn.cuda import generation
from gpurnn.cuda.engines import EmulatedEngine
from gpurnn.dense import Dense, GroupSizes, RowSizes
from gpurnn.kernels.sampling import NOT_A_NUMBER
from gpurnn.planning import Group, Limits, generation_group, generation_parts, generation_rows
from gpurnn.planning import generation as plans
from gpurnn.sampling import TokenSampler

pytest.importorskip("greenlet", reason="the emulator needs greenlet")
pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")

Array = np.ndarray[Any, Any]

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 3, "temperature": 1.5},
    {"top_p": 0.6, "top_k": 4},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)
each_exchange = pytest.mark.parametrize("exchange", EXCHANGES)

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 7},
    "no-bias": {"hidden_size": 3, "bias": False},
    "embedding": {"hidden_size": 17, "embedding_size": 3},
    "two-layers": {"hidden_size": 5, "num_layers": 2},
    "everything": {"hidden_size": 9, "num_layers": 3, "embedding_size": 4, "activation": "sigmoid"},
    "float32": {"hidden_size": 16, "dtype": np.float32},
    "relu": {"hidden_size": 6, "activation": "relu", "bias": False},
}
each_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def plans_anew() -> Iterator[None]:
    """Tests change what plans are made by."""
    plans._plan.cache_clear()
    yield
    plans._plan.cache_clear()


def some_prefixes(model: LanguageModel, lengths: Sequence[int] = (3, 1, 5)) -> list[Array]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, len(model.vocabulary), length) for length in lengths]


def sampler_of(settings: dict[str, Any]) -> TokenSampler:
    return TokenSampler(**settings, never=(0,), seed=3)


def assert_as_numpy(
    model: LanguageModel,
    settings: dict[str, Any],
    kernel: str | Group | None = None,
    *,
    n: int = 7,
    lengths: Sequence[int] = (3, 1, 5),
    device: Limits | str = "H100",
    seed: int | None = None,
) -> Array:
    prefixes = some_prefixes(model, lengths)
    expected = model.generated(prefixes, n, sampler_of(settings))
    with gpurnn.emulated(device, seed=seed):
        found = model.generated(prefixes, n, sampler_of(settings), kernel)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    return found


# A block a row


@each_model
@pytest.mark.parametrize("kernel", ["resident", "streamed"])
def test_a_greedy_text_is_numpys(options: dict[str, Any], kernel: str) -> None:
    model = language(**options)
    found = assert_as_numpy(model, {"temperature": 0}, kernel, n=10, seed=1)
    assert len(np.unique(found)) > 1, "no loop of a single token: this compares something"


@each_setting
@each_model
def test_a_drawn_text_is_numpys(options: dict[str, Any], settings: dict[str, Any]) -> None:
    assert_as_numpy(language(**options), settings)


def test_an_activation_of_ones_own() -> None:
    own = gpurnn.Activation(lambda z: 0.5 * z + 0.1 * z * z, lambda z: 0.5 + 0.2 * z)
    assert_as_numpy(language(activation=own), {"temperature": 0.7})


@pytest.mark.parametrize("seed", [2, 3])
def test_bits_do_not_depend_on_the_schedule(seed: int) -> None:
    model = language(hidden_size=9, num_layers=2)
    first = assert_as_numpy(model, {"temperature": 0.7})
    np.testing.assert_array_equal(assert_as_numpy(model, {"temperature": 0.7}, seed=seed), first)


def words_model(q: int, **options: Any) -> LanguageModel:
    """A model of more tokens than a warp draws of."""
    return language([f"w{i}" for i in range(q - 1)], Tokenizer("word"), **options)


@each_setting
def test_many_tokens_are_drawn_by_a_block(settings: dict[str, Any]) -> None:
    assert_as_numpy(words_model(135, hidden_size=5), settings, n=3, lengths=(2, 1))


def test_logits_that_shared_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_rows, "MOST_LOGITS", 0)
    model = words_model(130, hidden_size=5)
    for settings in ({"temperature": 0.7}, {"top_p": 0.5, "top_k": 20}):
        assert_as_numpy(model, settings, n=3, lengths=(2, 1))


def sizes_of(model: LanguageModel, device: Limits | str = "H100") -> tuple[RowSizes, str]:
    h, q = model.params["W_hq"].shape
    plan = planning.generation_plan(
        rows=1,
        h=h,
        q=q,
        layers=model.rnn.num_layers,
        dtype=model.rnn.dtype.name,
        device=planning.limits("device", device),
    )
    assert isinstance(plan.tile, RowSizes)
    return plan.tile, plan.kernel


def with_shared(numbers: int) -> Limits:
    return Limits("a card of little shared memory", (8, 0), 8, numbers, numbers + 1024, 1.4)


def test_what_a_block_does_not_hold_is_read_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a matrix in registers, in shared memory and in global memory, all at once."""
    model = language(hidden_size=40, activation="identity", bias=False)
    for p in model.params.values():
        p *= 0.3
    monkeypatch.setattr(generation_rows, "OTHER_REGISTERS", 255 - 90)
    monkeypatch.setattr(generation_parts, "IN_FLIGHT", 20)
    card = with_shared(1024 + 8 * 2200)
    sizes, kernel = sizes_of(model, card)
    first = sizes.matrices[0]
    assert kernel == "streamed"
    assert first.kept and first.held and first.kept + first.held < first.quads
    assert_as_numpy(model, {"temperature": 0.7}, n=4, lengths=(2, 1), device=card)


def test_more_columns_than_a_pass_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_rows, "MOST_THREADS", 32)
    model = language(ALPHABET, hidden_size=37, num_layers=2)
    for device in ("H100", with_shared(1024 + 8 * 500)):
        sizes, kernel = sizes_of(model, device)
        assert [m.passes for m in sizes.matrices] == [2, 2, 2, 1]
        assert kernel == ("resident" if device == "H100" else "streamed")
        assert_as_numpy(model, {"temperature": 0.7}, n=4, lengths=(2, 1), device=device)


# Several blocks a row


@each_exchange
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_group_draws_numpys_text(exchange: str, blocks: int) -> None:
    blocks += exchange == "cluster" and blocks == 3
    model = language(hidden_size=13, dtype=np.float32)
    for i, settings in enumerate(SETTINGS if blocks == 2 else SETTINGS[:2]):
        found = assert_as_numpy(
            model, settings, Group(blocks, exchange), n=5, lengths=(3, 1), seed=i or None
        )
        if i == 0:
            assert len(np.unique(found)) > 1


@each_exchange
def test_a_groups_text_does_not_depend_on_the_schedule(exchange: str) -> None:
    model = language(hidden_size=11, dtype=np.float32, embedding_size=3)
    for seed in (None, 1, 2):
        assert_as_numpy(model, {}, Group(2, exchange), n=5, lengths=(2, 1), seed=seed)


def group_plan(model: LanguageModel, blocks: int, exchange: str, *, split: bool) -> planning.Plan:
    """A plan of a group that exchanges its logits, or does not."""
    (h, q), rows = model.params["W_hq"].shape, 2
    device = planning.DEVICES["H100"]
    sizes = next(generation_group.group_sizes(h, q, blocks, device, split=split))
    return generation_group.group_plan(rows, sizes, exchange, 8, device)[1]


def by_plan(
    model: LanguageModel,
    plan: planning.Plan,
    settings: dict[str, Any],
    n: int,
    engine: EmulatedEngine | None = None,
    lengths: Sequence[int] = (2, 1),
) -> tuple[Array, Array]:
    if engine is None:
        engine = EmulatedEngine(planning.DEVICES["H100"], None, True)
    return generation.run(
        engine,
        plan,
        model.params,
        model.rnn.num_layers,
        validate.activation(model.rnn.activation),
        some_prefixes(model, lengths),
        n,
        sampler_of(settings),
        0,
    )


@each_exchange
@pytest.mark.parametrize(("q", "blocks"), [(6, 2), (11, 4), (131, 2)], ids=str)
def test_logits_may_be_exchanged_as_well(q: int, blocks: int, exchange: str) -> None:
    model = words_model(q, hidden_size=13, dtype=np.float32)
    n = 2 if q > 100 else 5
    plan = group_plan(model, blocks, exchange, split=True)
    assert isinstance(plan.tile, GroupSizes) and plan.tile.split
    for settings in SETTINGS[:1] if q > 100 else SETTINGS[1:3]:
        expected = model.generated(some_prefixes(model, (2, 1)), n, sampler_of(settings))
        found, codes = by_plan(model, plan, settings, n)
        np.testing.assert_array_equal(found, expected)
        assert not codes.any()


@each_exchange
def test_many_tokens_are_drawn_by_every_block_of_a_group(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their table is more than shared memory has room for."""
    monkeypatch.setattr(generation_group, "MOST_TABLE", 0)
    model = words_model(130, hidden_size=7, dtype=np.float32)
    plan = group_plan(model, 2, exchange, split=False)
    expected = model.generated(some_prefixes(model, (2, 1)), 2, sampler_of({}))
    np.testing.assert_array_equal(by_plan(model, plan, {}, 2)[0], expected)


@pytest.mark.parametrize("exchange", ["flags", "counter"])
def test_more_texts_than_groups_run_at_once(exchange: str) -> None:
    card = Limits("four multiprocessors", (8, 0), 4, 232_448, 233_472, 1.4)
    model = language(hidden_size=6, dtype=np.float32)
    lengths = (1, 2, 1, 3, 1)
    assert_as_numpy(model, {}, Group(2, exchange), n=3, lengths=lengths, device=card)


@dataclass(frozen=True)
class Lacking(EmulatedEngine):
    """An engine whose launches lack their last block, and where nobody waits for long."""

    reports: list[Array] = field(default_factory=list, compare=False)

    def report(self, blocks: int) -> Array:
        self.reports.append(super().report(blocks))
        return self.reports[-1]

    def launch(self, spec, grid, block, arrays, integers=((),), shared=0, **how):  # type: ignore[no-untyped-def]
        impatient = [(*numbers[:-1], 40) for numbers in integers]
        super().launch(spec, (grid[0] - 1, 1, 1), block, arrays, impatient, shared, **how)


@pytest.mark.parametrize("exchange", ["flags", "counter"])
@pytest.mark.parametrize("split", [False, True])
def test_a_block_that_never_comes_is_reported(exchange: str, split: bool) -> None:
    """Of two texts: one is whole, and of the other nothing is drawn."""
    model = language(hidden_size=9, dtype=np.float32)
    engine = Lacking(planning.DEVICES["H100"], None, True)
    plan = group_plan(model, 2, exchange, split=split)
    found, codes = by_plan(model, plan, {}, 3, engine)
    assert engine.reports[0].tolist() == [0, 0, 1, 0]
    expected = model.generated(some_prefixes(model, (2, 1)), 3, sampler_of({}))
    np.testing.assert_array_equal(found, [expected[0], [-1, -1, -1]])
    assert not codes.any()


# Rows, seeds and what is refused


def test_a_text_depends_on_its_row_and_its_number() -> None:
    model = language(ALPHABET)
    prefix = some_prefixes(model, (3,))[0]
    with gpurnn.emulated():
        sampler = TokenSampler(seed=1)
        both = model.generated([prefix, prefix], 6, sampler)
        alone = model.generated([prefix], 6, TokenSampler(seed=1))
        assert sampler.count == 6
        later = model.generated([prefix], 6, sampler)
        other = model.generated([prefix], 6, TokenSampler(seed=2))
    np.testing.assert_array_equal(both[0], alone[0])
    for different in (both[1], later[0], other[0]):
        assert (different != alone[0]).any()
    sampler = TokenSampler(seed=1)
    np.testing.assert_array_equal(model.generated([prefix, prefix], 6, sampler), both)
    np.testing.assert_array_equal(model.generated([prefix], 6, sampler), later)


def test_texts_of_a_model_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language(ALPHABET)
    expected = model.generate(["the", "a"], 8, seed=4)
    assert expected[0] == model.generate("the", 8, seed=4)
    assert expected[1] != model.generate("a", 8, seed=4)
    launches = []
    launch = EmulatedEngine.launch

    def counted(self: Any, spec: Any, *arguments: Any, **more: Any) -> None:
        launches.append(spec.kind)
        launch(self, spec, *arguments, **more)

    monkeypatch.setattr(EmulatedEngine, "launch", counted)
    with gpurnn.emulated():
        assert model.generate(["the", "a"], 8, seed=4) == expected
        assert model.generate("the", 8, seed=4, kernel="streamed") == expected[0]
        assert model.generate(["the", "a"], 0) == ["the", "a"]
        assert model.generate([], 5) == []
    assert launches == ["generate_rows"] * 2


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}], ids=str)
def test_logits_beyond_bounds_are_refused_as_on_numpy(settings: dict[str, Any]) -> None:
    """Weights are finite, and their products overflow."""
    model = language(hidden_size=3, activation="identity", dtype=np.float64)
    for value, least in ((np.inf, 1e200), (np.nan, 1e200)):
        set_params(model, W_xh=np.full((6, 3), least), W_hq=np.full((3, 6), 1e200))
        if value is np.nan:
            model.params["W_hq"][1] *= -1
        message = re.escape(f"O holds {value}: expected logits below infinity")
        for place in (gpurnn.emulated(), gpurnn.emulated(seed=1)):
            with place, pytest.raises(ValueError, match=f"^{message}$"):
                model.generated([np.array([1, 2])], 4, TokenSampler(**settings))
        with pytest.raises(ValueError, match=f"^{message}$"):
            model.generated([np.array([1, 2])], 4, TokenSampler(**settings))


def test_a_row_that_ends_leaves_the_others_alone() -> None:
    """Each token has its own logits; one that cannot be drawn from follows token 2."""
    model = language(hidden_size=6, activation="identity", dtype=np.float32)
    after = np.zeros((6, 6), np.float32)
    for token, following in ((1, 2), (3, 4), (4, 3)):
        after[token, following] = 9
    after[2, 5] = np.nan
    set_params(model, W_xh=np.eye(6), W_hq=after)
    prefixes = [np.array([1]), np.array([3])]
    phi = validate.activation("identity")
    for plan in (
        planning.generation_plan(
            rows=2, h=6, q=6, layers=1, dtype="float32", device=planning.DEVICES["H100"]
        ),
        group_plan(model, 2, "cluster", split=False),
        group_plan(model, 2, "flags", split=True),
    ):
        # 0 · NaN is NaN: the state is one-hot, so only what it multiplies may be looked at
        clean = {k: p.copy() for k, p in model.params.items()}
        clean["W_hq"][2, 5] = 3e38
        clean["W_hq"][2, 4] = 3e38
        clean["W_xh"][2, 2] = 10
        engine = EmulatedEngine(planning.DEVICES["H100"], None, True)
        sampler = TokenSampler(0)
        found, codes = generation.run(engine, plan, clean, 1, phi, prefixes, 4, sampler, 0)
        np.testing.assert_array_equal(found, [[2, -1, -1, -1], [4, 3, 4, 3]])
        assert codes[0] < 0 and codes[0] != NOT_A_NUMBER and codes[1] == 0


def test_a_distribution_over_nothing_is_refused() -> None:
    model = language()
    sampler = TokenSampler(never=tuple(range(6)))
    message = re.escape(f"of 6 tokens none may be drawn: {list(range(6))} never are")
    for place in (gpurnn.emulated(), nullcontext()):
        with place, pytest.raises(ValueError, match=f"^{message}$"):
            model.generated([np.array([1])], 2, sampler)


def test_nothing_to_generate() -> None:
    model = language()
    with gpurnn.emulated():
        assert model.generated([np.array([1])], 0, TokenSampler()).shape == (1, 0)
        assert model.generated([], 3, TokenSampler()).shape == (0, 3)


def test_arguments_are_refused() -> None:
    model = language()
    one = [np.array([1])]
    for prefixes, message in (
        ([np.array([], int)], "prefixes[0] has shape (0,): expected at least one id"),
        ([*one, np.array([6])], "prefixes[1] holds the id 6 at index (0,): the vocabulary has 6"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            model.generated(prefixes, 2, TokenSampler())
    with pytest.raises(TypeError, match=re.escape("prefixes[0] is a builtins.list: expected a")):
        model.generated([[1]], 2, TokenSampler())  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^kernel is 'step': expected one of resident, streamed"):
        model.generated(one, 2, TokenSampler(), "step")
    with pytest.raises(ValueError, match=r"^kernel is 'resident' but the parameters are numpy"):
        model.generated(one, 2, TokenSampler(), "resident")
    deep = language(num_layers=2, dtype=np.float32)
    with gpurnn.emulated():
        with pytest.raises(ValueError, match=r"'group': dtype is float64: expected float32, or k"):
            model.generated(one, 2, TokenSampler(), "group")
        with pytest.raises(ValueError, match=r"the model has 2 layers: expected one, or kernel 's"):
            deep.generated(one, 2, TokenSampler(), "group")


def test_a_dense_matrix_is_packed_so_that_threads_read_side_by_side() -> None:
    sizes = Dense(h=7, width=9, columns=2, slices=4, threads=8)
    W = np.arange(63.0).reshape(7, 9)
    packed = np.full((sizes.passes, sizes.quads, sizes.columns, sizes.threads, 4), np.nan)
    assert packed.size == sizes.numbers
    generation._pack(np, W, sizes, packed.reshape(-1))
    for p, i, c, thread, e in np.ndindex(packed.shape):
        k = thread % 4 * sizes.depth + 4 * i + e
        j = (p * sizes.groups + thread // 4) * sizes.columns + c
        assert packed[p, i, c, thread, e] == (W[k, j] if k < 7 and j < 9 else 0)


def test_vocabulary_of_two_tokens() -> None:
    model = LanguageModel(Vocabulary(["a"]), hidden_size=2)
    with gpurnn.emulated():
        assert model.generate("a", 3) == "aaaa"
