"""The group kernel under the emulator: every exchange, groups of 2 to 8 blocks, race check on."""

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases import CASES, EMPTY, SMALL, Case, draw, draw_off_kink
from group_setup import EXCHANGES, SMALL_CARD, launch, run_backward, run_forward
from kernel_setup import Array, each_activation, exact, reference_states, results
from tolerance import KINK_MARGIN, assert_close, assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning, reference
from gpurnn.activations import ACTIVATIONS
from gpurnn.cuda.specs import KernelSpec
from gpurnn.emulator import EmulationError
from gpurnn.planning import Group
from gpurnn.tile import Share

ODD = next(case for case in SMALL if case.name == "odd")
PRIME = next(case for case in SMALL if case.name == "prime")

each_exchange = pytest.mark.parametrize("exchange", EXCHANGES)


def assert_group_as_reference(
    case: Case, drawn: Any, group: Group, activation: Any = "tanh", **options: Any
) -> None:
    seed = options.pop("seed", None)
    with gpurnn.emulated(SMALL_CARD, seed=seed):
        found = results(drawn, activation, kernel=group, **options)
    truth = exact(drawn, activation, **options)
    baseline = results(drawn, activation, **options)
    assert found.keys() == truth.keys()
    for name, a in found.items():
        assert a.dtype == np.float32
        assert_close(f"{group} {name}", a, truth[name], length=case.length, baseline=baseline[name])


CASES_OF_EXCHANGES = [
    pytest.param(
        case,
        EXCHANGES[(i + more) % 3],
        marks=[] if case in SMALL and not more else pytest.mark.slow,
    )
    for i, case in enumerate(case for case in CASES if case.h <= 33 and case.n <= 33)
    for more in range(3)
]


@pytest.mark.parametrize(("case", "exchange"), CASES_OF_EXCHANGES, ids=str)
def test_every_case(case: Case, exchange: str) -> None:
    drawn = draw(case, dtype=np.float32)
    assert_group_as_reference(case, drawn, Group(2, exchange), seed=case.h)


@pytest.mark.parametrize(
    "group",
    [
        Group(2, "cluster"),
        Group(4, "cluster"),
        Group(8, "cluster", 2),
        Group(3, "flags"),
        Group(8, "flags"),
        Group(2, "flags", 1),
        Group(5, "counter"),
        Group(8, "counter", 3),
    ],
    ids=str,
)
def test_groups_of_several_sizes(group: Group) -> None:
    case = Case("", T=4, n=3, d=2, h=19)
    assert_group_as_reference(case, draw(case, dtype=np.float32), group, seed=group.blocks)


@pytest.mark.slow
@each_exchange
def test_more_units_than_a_block_owns(exchange: str) -> None:
    """h = 129 over 4 blocks: columns past h are padding, and slices of k have several vectors."""
    case = Case("past-128", T=3, n=2, d=3, h=129)
    drawn = draw(case, dtype=np.float32)
    assert_group_as_reference(case, drawn, Group(4, exchange, rows=2), seed=1)


@each_activation
def test_activations(activation: str) -> None:
    drawn = draw_off_kink(PRIME, KINK_MARGIN[np.dtype(np.float32)], dtype=np.float32)
    exchange = EXCHANGES[len(activation) % 3]
    assert_group_as_reference(PRIME, drawn, Group(2, exchange, rows=3), activation)


@each_exchange
def test_an_activation_of_ones_own_that_wants_what_it_was_applied_to(exchange: str) -> None:
    own = gpurnn.Activation(
        lambda z: 0.9 * math.tanh(z) + 0.1 * z,
        lambda z: 0.9 * (1.0 - math.tanh(z) ** 2) + 0.1,
    )
    assert_group_as_reference(ODD, draw(ODD, dtype=np.float32), Group(2, exchange), own)


@each_exchange
def test_truncated_gradients(exchange: str) -> None:
    xi = np.array([2, 0, 1, 0.5, 1.5], np.float32)
    assert_group_as_reference(ODD, draw(ODD, dtype=np.float32), Group(2, exchange), xi=xi)


@pytest.mark.parametrize(
    "variant", [{"by_id": True}, {"h_0": False}, {"bias": False, "by_id": True}], ids=str
)
def test_ids_and_what_may_be_left_out(variant: dict[str, bool]) -> None:
    assert_group_as_reference(ODD, draw(ODD, dtype=np.float32), Group(2, "flags"), **variant)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@each_exchange
def test_without_steps_or_rows_there_is_nothing_to_launch(case: Case, exchange: str) -> None:
    drawn = draw(case, dtype=np.float32)
    with gpurnn.emulated(SMALL_CARD):
        found = results(drawn, kernel=Group(2, exchange))
    expected = results(drawn)
    for name, a in found.items():
        assert_same_bits(name, a, expected[name].astype(np.float32))


XI = np.array([1.5, 0.5, 2], np.float32)

# Sizes that plan() need not choose: h, blocks, groups of lanes, columns, rows, passes, kept.
SHARES = {
    "one-column": Share(13, 3, 6, 1, 1, 1, 4),
    "several-passes": Share(13, 2, 8, 1, 2, 3, 4),
    "weights-in-shared-memory": Share(13, 2, 4, 2, 2, 2, 0),
    "weights-in-both": Share(70, 4, 10, 2, 1, 1, 4),
    "more-rows-than-lanes": Share(13, 2, 2, 4, 8, 1, 4),
    "columns-by-eight": Share(13, 2, 2, 8, 4, 2, 0),
    "a-block-without-columns": Share(13, 4, 2, 4, 1, 1, 4),
}


WAYS = [
    pytest.param(
        share,
        EXCHANGES[(i + more) % 3],
        marks=pytest.mark.slow if more else [],
        id=f"{name}-{more}",
    )
    for i, (name, share) in enumerate(SHARES.items())
    for more in range(3)
]


@cache
def by_one_column(h: int, n: int) -> tuple[Array, Array]:
    """Return states and gradients of the plainest share, which all others are held to."""
    drawn = draw(Case("", T=3, n=n, d=2, h=h), dtype=np.float32)
    plain = Share(h, 2, -(-h // 4) * 2, 1, 1, 1, -(-h // 64) * 4)
    states = run_forward(plain, "counter", drawn)
    return states, run_backward(plain, "counter", drawn, states, xi=XI)


@pytest.mark.parametrize(("share", "exchange"), WAYS)
def test_every_way_of_sharing_out(share: Share, exchange: str) -> None:
    """The same bits, whoever owns what and however states are exchanged: h alone decides."""
    if exchange == "cluster" and share.blocks == 3:
        share = share._replace(blocks=4)
    n = 2 if share.h > 64 else 5
    case = Case("", T=3, n=n, d=2, h=share.h)
    drawn = draw(case, dtype=np.float32)
    states = run_forward(share, exchange, drawn, seed=3)
    truth, lost = (reference_states(drawn, dtype) for dtype in (np.float64, np.float32))
    assert_close("states", states, truth, length=case.length, baseline=lost)
    expected, gradients = by_one_column(share.h, n)
    assert_same_bits("states", states, expected)
    grads = run_backward(share, exchange, drawn, states, xi=XI, seed=4)
    assert_same_bits("grads", grads, gradients)
    assert np.isfinite(grads).all()


@each_exchange
def test_bits_do_not_depend_on_the_schedule(exchange: str) -> None:
    share = Share(9, 4, 2, 2, 1, 2, 4)
    drawn = draw(Case("", T=4, n=3, d=2, h=9), dtype=np.float32)
    states = [run_forward(share, exchange, drawn, seed=seed) for seed in (None, 1, 2)]
    grads = [run_backward(share, exchange, drawn, states[0], seed=seed) for seed in (None, 5)]
    for first, second in (*pairwise(states), *pairwise(grads)):
        assert_same_bits("under another schedule", first, second)


@each_exchange
def test_rows_that_no_group_of_a_launch_owns_are_left_alone(exchange: str) -> None:
    """The host launches again, from ``row_0`` on, for what a grid does not own."""
    share = Share(5, 2, 4, 1, 2, 1, 4)
    drawn = draw(Case("", T=2, n=7, d=2, h=5), dtype=np.float32)
    whole = run_forward(share, exchange, drawn)
    part = run_forward(share, exchange, drawn, row_0=2, groups=2)
    assert_same_bits("rows of the launch", part[:, 2:6], whole[:, 2:6])
    assert np.isnan(part[1:, :2]).all() and np.isnan(part[1:, 6:]).all()
    empty = run_forward(share, exchange, drawn, groups=5)  # the last one owns no row
    assert_same_bits("all rows", empty, whole)


def test_more_rows_than_all_groups_own_at_once() -> None:
    card = planning.Limits("two multiprocessors", (8, 0), 2, 232_448, 233_472, 1.4)
    drawn = draw(Case("", T=2, n=20, d=2, h=5), dtype=np.float32)
    with gpurnn.emulated(card):
        H, residuals = F.rnn_forward(*drawn.arguments(), kernel=Group(2, "flags", rows=8))
        gradients = F.rnn_backward(drawn.dH, residuals)
    assert residuals.plan is not None
    assert (residuals.plan.launches, residuals.plan.grid) == (3, (2, 1, 1))
    expected, of_numpy = F.rnn_forward(*drawn.arguments())
    assert_close("H", H, exact(drawn)["H"], length=100, baseline=expected)
    for a, b in zip(gradients, F.rnn_backward(drawn.dH, of_numpy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", ["flags", "counter"])
def test_a_block_that_never_comes_is_reported(exchange: str) -> None:
    """Blocks of its group give up, say in which exchange, and leave NaN; other groups finish."""
    share = Share(9, 3, 4, 1, 1, 1, 4)
    drawn = draw(Case("", T=4, n=2, d=2, h=9), dtype=np.float32)
    whole = run_forward(share, exchange, drawn)
    states = np.full_like(whole, np.nan)
    states[0] = drawn.h_0
    Z = (drawn.X @ drawn.W_xh).reshape(-1)
    spec = KernelSpec("group_forward", share, "tanh", "float32", False, exchange)
    arrays = [Z, states.reshape(-1), drawn.W_hh, drawn.b_h]
    report, _ = launch(spec, arrays, 4, 2, missing=1, patience=50)
    assert report.tolist() == [0, 0, 0, 1, 1, 0]
    assert_same_bits("the whole group", states[:, 0], whole[:, 0])
    owned = slice(0, 2 * share.width)
    assert_same_bits("the first step", states[1, 1, owned], whole[1, 1, owned])
    assert np.isnan(states[2:, 1]).all()

    grads = np.full_like(whole, np.nan)
    spec = KernelSpec("group_backward", share, "tanh", "float32", False, exchange)
    arrays = [drawn.dH.reshape(-1), whole[1:].reshape(-1), grads.reshape(-1), drawn.W_hh]
    report, _ = launch(spec, arrays, 4, 2, missing=1, patience=50)
    assert report.tolist() == [0, 0, 0, 1, 1, 0]
    assert np.isfinite(grads[:, 0]).all() and np.isfinite(grads[4, 1, owned]).all()
    assert np.isnan(grads[:4, 1]).all()


@pytest.mark.parametrize("exchange", ["flags", "counter"])
def test_a_block_without_columns_may_lag(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, so it must not wait for words that others have overwritten since."""
    from numba import cuda, uint32

    from gpurnn.kernels import group
    from gpurnn.kernels.device import device
    from gpurnn.kernels.ptx import load_relaxed

    made = group.exchange
    idle, rounds = uint32(2), 60

    def slowed(*arguments: Any) -> Any:
        real = made(*arguments)

        @device
        def wait(words, v, source, base, of_group, buffer, rows, tag, patience):  # type: ignore[no-untyped-def]
            if uint32(cuda.blockIdx.x) == idle:
                for _ in range(rounds):
                    load_relaxed(words, uint32(0))
            return real.wait(words, v, source, base, of_group, buffer, rows, tag, patience)

        return real._replace(wait=wait)

    monkeypatch.setattr(group, "exchange", slowed)
    share = Share(8, 3, 2, 2, 1, 1, 4)  # 4 columns a block: the third has none
    drawn = draw(Case("", T=8, n=1, d=2, h=8), dtype=np.float32)
    own = gpurnn.Activation(lambda z: 0.25 * z, lambda h: 0.25, of_output=True)  # built anew
    states = run_forward(share, exchange, drawn, own, patience=500)
    assert np.isfinite(states).all()
    monkeypatch.undo()
    again = gpurnn.Activation(lambda z: 0.25 * z, lambda h: 0.25, of_output=True)
    assert_same_bits("states", states, run_forward(share, exchange, drawn, again))


@each_exchange
def test_an_exchange_that_does_not_wait_is_found(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster the race check sees it, with the others what is computed: nothing arrives."""
    from numba import cuda, uint32

    from gpurnn.kernels import group
    from gpurnn.kernels.device import device

    none = uint32(0)

    @device
    def no_wait(words, v, source, base, of_group, buffer, rows, tag, patience):  # type: ignore[no-untyped-def]
        cuda.syncthreads()
        return none

    @device
    def no_post(words, of_group):  # type: ignore[no-untyped-def]
        pass

    made = group.exchange

    def broken(*arguments: Any) -> Any:
        return made(*arguments)._replace(wait=no_wait, post=no_post)

    monkeypatch.setattr(group, "exchange", broken)
    share = Share(7, 2, 2, 2, 1, 1, 4)
    drawn = draw(Case("", T=3, n=2, d=2, h=7), dtype=np.float32)
    own = gpurnn.Activation(lambda z: 0.5 * z, lambda h: 0.5, of_output=True)  # built anew
    if exchange == "cluster":
        with pytest.raises(EmulationError):
            run_forward(share, exchange, drawn, own)
    else:  # nothing arrives: zeros are multiplied
        states = run_forward(share, exchange, drawn, own)
        assert np.abs(states[2:] - run_forward(share, exchange, drawn, "identity")[2:]).max() > 0.01


def test_infinities_go_the_way_of_the_reference() -> None:
    """The first step of the backward pass takes nothing from beyond, not 0 · ∞."""
    drawn = draw(ODD, dtype=np.float32)
    drawn.W_hh[2, 3] = np.inf
    share = Share(9, 2, 6, 1, 1, 3, 4)
    states = reference_states(draw(ODD, dtype=np.float32), np.float32)
    grads = run_backward(share, "flags", drawn, states, "tanh")
    with np.errstate(all="ignore"):
        X = drawn.X
        _, dh_0, *_ = reference.rnn_backward(
            drawn.dH, X, states, None, drawn.W_xh, drawn.W_hh, ACTIVATIONS["tanh"], None
        )
    assert np.isfinite(grads[ODD.T]).all()
    np.testing.assert_array_equal(np.isfinite(grads[0]), np.isfinite(dh_0))
