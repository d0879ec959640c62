"""What the host does for a generation on a GPU, without one: CuPy is a stand-in."""

from collections.abc import Iterator
from typing import Any

import fake_cupy
import numpy as np
import pytest
from language_model_setup import language

import gpurnn
from gpurnn import LanguageModel
from gpurnn.planning import Group
from gpurnn.sampling import TokenSampler


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.FakeCuPy]:
    fake = fake_cupy.install(monkeypatch)
    empty = fake.empty

    def poisoned(shape: Any, dtype: Any) -> Any:
        with np.errstate(invalid="ignore"):  # of integers a NaN makes the least
            return empty(shape, dtype)

    monkeypatch.setattr(fake, "empty", poisoned)
    get = lambda a: np.array(a.view(np.ndarray))  # noqa: E731
    monkeypatch.setattr(fake_cupy.Array, "get", get, raising=False)
    monkeypatch.setattr(fake, "array", lambda a: fake.new(np.asarray(a)), raising=False)
    monkeypatch.setattr(fake, "ascontiguousarray", lambda a: a, raising=False)
    yield fake
    fake_cupy.clear()


def on_gpu(cupy: fake_cupy.FakeCuPy, model: LanguageModel) -> LanguageModel:
    for params in (model.rnn.params, model._own):
        for name, p in params.items():
            params[name] = cupy.new(p)
    return model


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"num_layers": 2, "embedding_size": 3}, None),
        ({"bias": False}, "streamed"),
        ({"dtype": np.float32}, Group(2, "cluster")),
        ({"dtype": np.float32}, Group(2, "flags")),
        ({"dtype": np.float32}, Group(2, "counter")),
    ],
    ids=str,
)
def test_a_gpu_draws_what_the_emulator_does(
    cupy: fake_cupy.FakeCuPy, options: dict[str, Any], kernel: str | Group | None
) -> None:
    """So the packed arguments are right, and all that is different for CuPy."""
    prefixes = [np.array([1, 2, 3]), np.array([4])]
    with gpurnn.emulated():
        sampler = TokenSampler(top_k=4, never=(0,), seed=2)
        expected = language(**options).generated(prefixes, 5, sampler, kernel)
    model = on_gpu(cupy, language(**options))
    sampler = TokenSampler(top_k=4, never=(0,), seed=2)
    found = model.generated(prefixes, 5, sampler, kernel)
    assert type(found) is np.ndarray and found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    kinds = [spec.kind for spec, _ in cupy.launches]
    assert kinds == ["generate_group" if isinstance(kernel, Group) else "generate_rows"]
    assert model.generate("ab", 4, seed=1, kernel=kernel) == language(**options).generate(
        "ab", 4, seed=1
    )


def test_a_block_that_gave_up_is_an_error(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurnn.cuda import reports

    model = on_gpu(cupy, language(dtype=np.float32))
    run = fake_cupy.Function.run

    def reporting(self: Any, *arguments: Any, **more: Any) -> None:
        run(self, *arguments, **more)
        reports._mapped[0].words[1] = 3

    monkeypatch.setattr(fake_cupy.Function, "run", reporting)
    with pytest.raises(RuntimeError, match="block 1 waited in vain for the others at exchange 3"):
        model.generated([np.array([1])], 3, TokenSampler(), Group(2, "flags"))
