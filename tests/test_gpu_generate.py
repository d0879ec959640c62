"""Generation on a GPU: NumPy's texts, at the sizes that are meant for it."""

from typing import Any

import numpy as np
import pytest
from gpu_setup import GPU, cp, gpu
from language_model_setup import ALPHABET

from gpurnn import LanguageModel, Tokenizer, Vocabulary, validate
from gpurnn.cuda import generation
from gpurnn.cuda.engines import GPUEngine, limits_of
from gpurnn.planning import Group
from gpurnn.sampling import TokenSampler

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"top_k": 5, "top_p": 0.8},
]


def language(q: int = 28, **options: Any) -> LanguageModel:
    """A float64 or float32 model with logits that differ enough to tell tokens apart."""
    tokens = ALPHABET if q == 28 else [f"w{i}" for i in range(q - 1)]
    model = LanguageModel(Vocabulary(tokens), Tokenizer("word" if q != 28 else "char"), **options)
    for name, p in model.params.items():
        p *= 4 if name in ("W_hq", "W_xh") else 1.5
    return model


def on_gpu(
    gpu: GPU,
    model: LanguageModel,
    prefixes: list[Any],
    n: int,
    settings: dict[str, Any],
    kernel: str | Group | None = None,
) -> Any:
    device = int(gpu.cp.cuda.Device().id)
    params = {name: gpu.put(p) for name, p in model.params.items()}
    return generation.generate(
        GPUEngine(device),
        kernel,
        params,
        model.rnn.num_layers,
        validate.activation(model.rnn.activation),
        prefixes,
        n,
        TokenSampler(**settings, never=(0,), seed=7),
        0,
    )


def agreeing(
    model: LanguageModel, prefix: Any, found: Any, settings: dict[str, Any], row: int
) -> float:
    """Return the part of a text's tokens that NumPy would have drawn after the same tokens."""
    sampler = TokenSampler(**settings, never=(0,), seed=7)
    fed = np.concatenate([prefix, found[:-1]])
    O, _ = model.forward(fed[:, None])
    drawn = [sampler.draw(o[0], number=i, row=row) for i, o in enumerate(O[len(prefix) - 1 :])]
    return float(np.mean(np.array(drawn) == found))


def assert_as_numpy(
    gpu: GPU,
    model: LanguageModel,
    settings: dict[str, Any],
    kernel: str | Group | None,
    *,
    n: int = 200,
    least: float = 1.0,
) -> None:
    """Hold the texts against NumPy's; ``least``: the part of each row's tokens that must agree.

    In float32 rounding decides once in a while, and the texts go apart from there on: then a token
    is held against what NumPy would have drawn after the same tokens.
    """
    rng = np.random.default_rng(1)
    prefixes = [rng.integers(1, len(model.vocabulary), length) for length in (3, 1, 40)]
    found = on_gpu(gpu, model, prefixes, n, settings, kernel)
    np.testing.assert_array_equal(on_gpu(gpu, model, prefixes, n, settings, kernel), found)
    if least == 1.0:
        expected = model.generated(prefixes, n, TokenSampler(**settings, never=(0,), seed=7))
        np.testing.assert_array_equal(found, expected)
    for row, (prefix, text) in enumerate(zip(prefixes, found, strict=True)):
        assert agreeing(model, prefix, text, settings, row) >= least
    assert len(np.unique(found)) > 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"hidden_size": 7, "num_layers": 3}, "resident"),
        ({"hidden_size": 64}, "resident"),
        ({"hidden_size": 96, "embedding_size": 5, "bias": False}, None),
        ({"hidden_size": 200}, "streamed"),
        ({"hidden_size": 300, "num_layers": 2, "activation": "sigmoid"}, "streamed"),
        ({"hidden_size": 33, "q": 1000}, None),
    ],
    ids=str,
)
def test_float64_texts_are_numpys(
    gpu: GPU, options: dict[str, Any], kernel: str | None, settings: dict[str, Any]
) -> None:
    assert_as_numpy(gpu, language(**options, dtype=np.float64), settings, kernel)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("h", "q", "kernel"),
    [
        (128, 28, "resident"),
        (200, 28, "resident"),
        (200, 97, None),
        (512, 28, None),
        (512, 28, "streamed"),
        (512, 28, Group(8, "cluster")),
        (512, 28, Group(16, "flags")),
        (512, 28, Group(8, "counter")),
        (300, 97, Group(5, "flags")),
        (512, 3000, None),
        (512, 3000, Group(8, "cluster")),
        (1024, 28, None),
    ],
    ids=str,
)
def test_float32_texts_are_numpys_for_long(
    gpu: GPU, h: int, q: int, kernel: str | Group | None, settings: dict[str, Any]
) -> None:
    if isinstance(kernel, Group) and kernel.exchange == "cluster":
        device = int(gpu.cp.cuda.Device().id)
        if not limits_of(device).largest_cluster:
            pytest.skip("this GPU has no clusters")
    model = language(q, hidden_size=h, dtype=np.float32)
    assert_as_numpy(gpu, model, settings, kernel, least=0.97)


def test_a_long_text_in_one_launch(gpu: GPU) -> None:
    """100,000 characters, twice the same, and each as NumPy draws it after those before it."""
    model = language(hidden_size=512, dtype=np.float32)
    prefix = [np.array([3, 4, 5])]
    found = on_gpu(gpu, model, prefix, 100_000, {})
    np.testing.assert_array_equal(on_gpu(gpu, model, prefix, 100_000, {}), found)
    assert found.min() > 0 and found.max() < 28
    assert agreeing(model, prefix[0], found[0], {}, 0) >= 0.99


def test_many_texts_at_once(gpu: GPU) -> None:
    """More rows than run at once; each as it is alone but for its number."""
    for kernel, h in ((None, 64), (Group(8, "flags"), 256)):
        model = language(hidden_size=h, dtype=np.float32)
        prefixes = [np.array([1 + i % 27]) for i in range(300)]
        found = on_gpu(gpu, model, prefixes, 20, {"temperature": 0}, kernel)
        for i in range(27):
            np.testing.assert_array_equal(
                found[i::27], np.repeat(found[i][None], len(found[i::27]), 0)
            )


def test_logits_beyond_bounds_are_refused(gpu: GPU) -> None:
    for h, kernel in ((64, None), (512, None), (300, "streamed")):
        model = language(hidden_size=h, dtype=np.float32)
        model.params["b_q"][5] = np.inf
        with pytest.raises(ValueError, match=r"^O holds inf: expected logits below infinity$"):
            on_gpu(gpu, model, [np.array([1])], 5, {}, kernel)
