"""A language model: tokenizer, recurrence, output layer (*Dive into Deep Learning* 9.4.3, 9.5)."""

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpurnn import checkpoint, generation, loss, validate
from gpurnn import functional as F
from gpurnn.activation import Activation
from gpurnn.batches import Windows
from gpurnn.cuda import devices
from gpurnn.cuda.arrays import beside, gpu_of, home_of, library_of, on_gpu, on_host
from gpurnn.evaluation import Evaluation
from gpurnn.planning import Group
from gpurnn.rnn import RNN, Initialisation, draw_weights
from gpurnn.sampling import TokenSampler
from gpurnn.text import Tokenizer, Vocabulary

__all__ = ["LanguageModel"]

Floats = NDArray[Any]
Ids = NDArray[Any]

EVALUATION_CHUNK = 1024  # time steps whose logits are held at once
NUMBERS_ON_GPU = 1 << 25  # states or logits of a GPU's chunk, where it is larger


class LanguageModel:
    """Predicts the next token: O_t = H_t W_hq + b_q over the states of an ``RNN``.

    Args:
        vocabulary: the tokens; q = |V| logits a step.
        tokenizer: how a text becomes tokens; the same for training, evaluation and prefixes.
        hidden_size, num_layers, activation, bias, dtype, init, seed: see ``RNN``.
        embedding_size: None feeds the one-hot vector of each token, as the book does (by picking
            rows of W_xh); a number learns an embedding E (|V|, embedding_size) in between.
        dropout: probability of zeroing an input of the output layer in training; 0 ≤ p < 1.

    The parameters are NumPy arrays, or after ``to("cuda")`` a GPU's: then everything is computed
    there, and the ids and states that are given and returned may lie there too. Ids in the host's
    memory are copied.

    Attributes:
        about: what the file that ``load`` read says of the model's origin.

    Raises:
        TypeError, ValueError: a size below 1, an unknown activation, …; see ``RNN``.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer | None = None,
        *,
        hidden_size: int = 32,
        num_layers: int = 1,
        activation: str | Activation = "tanh",
        bias: bool = True,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        dtype: DTypeLike = np.float32,
        init: Initialisation = "uniform",
        seed: int | np.random.Generator = 0,
    ) -> None:
        if not isinstance(vocabulary, Vocabulary):
            raise TypeError(f"vocabulary is {vocabulary!r}: expected a gpurnn.Vocabulary")
        self.vocabulary = vocabulary
        self.tokenizer = Tokenizer() if tokenizer is None else tokenizer
        self.dropout = validate.number(
            "dropout", dropout, "a probability in [0, 1)", lambda x: 0 <= x < 1
        )
        self.about: dict[str, Any] = {}
        q = len(vocabulary)
        rng = validate.generator("seed", seed)
        self.embedding_size = (
            None if embedding_size is None else validate.positive("embedding_size", embedding_size)
        )
        self._own: dict[str, Floats] = {}
        input_size = q if self.embedding_size is None else self.embedding_size
        if self.embedding_size is not None:
            E = rng.standard_normal((q, input_size)) / math.sqrt(input_size)  # rows of unit length
            self._own["E"] = E.astype(validate.dtype("dtype", dtype))
        self.rnn = RNN(
            input_size,
            hidden_size,
            num_layers,
            activation=activation,
            bias=bias,
            dtype=dtype,
            init=init,
            seed=rng,
        )
        h = hidden_size
        self._own["W_hq"] = draw_weights(init, h, (h, q), self.rnn.dtype, rng)
        if bias:
            self._own["b_q"] = draw_weights(init, h, (q,), self.rnn.dtype, rng)

    @property
    def params(self) -> Mapping[str, Floats]:
        """All parameters by name: the RNN's, W_hq (h, q), b_q (q,), E. Change them in place."""
        return MappingProxyType({**self.rnn.params, **self._own})

    @property
    def device(self) -> str:
        """Where the parameters lie: "cpu", or a GPU such as "cuda:0"."""
        gpu = gpu_of(self._own["W_hq"])
        return "cpu" if gpu is None else f"cuda:{gpu.index}"

    def to(self, device: str) -> Self:
        """Move the parameters to "cpu", "cuda" (CuPy's current GPU) or "cuda:N"; return the model.

        Raises:
            ValueError: the device is none of these, or not there.
            ImportError: a GPU is meant, and CuPy is not installed.
        """
        engine = devices.named(device)
        if engine == gpu_of(self._own["W_hq"]):
            return self
        moved = {name: on_host(p) for name, p in self.params.items()}
        if engine is not None:
            with engine.here():
                moved = {name: engine.xp.array(p) for name, p in moved.items()}
        self.use_params(moved)
        return self

    def use_params(self, params: Mapping[str, Floats]) -> None:
        """Take these arrays for the parameters themselves; what writes to them changes the model.

        Names, shapes and dtypes are those of ``params``; all lie in one place, CuPy's or NumPy's.

        Raises:
            ValueError: they are others.
        """
        layout, own = ({k: (p.shape, p.dtype) for k, p in a.items()} for a in (params, self.params))
        if layout != own:
            raise ValueError(f"parameters {layout}: expected {own}")
        if len({gpu_of(p) for p in params.values()}) > 1:
            raise ValueError("parameters lie in several places: expected one")
        for name, a in params.items():
            (self._own if name in self._own else self.rnn.params)[name] = a

    def num_parameters(self) -> int:
        """Return how many numbers ``params`` holds: 2,876 for |V| = 28, h = 32, at any T."""
        return sum(p.size for p in self.params.values())

    def init_state(self, n: int = 1) -> Floats:
        """Return the zero state for n sequences."""
        return self.rnn.init_state(n)

    def forward(
        self, X: Ids, state: Floats | None = None, *, check_ids: bool = True
    ) -> tuple[Floats, Floats]:
        """Return the logits O (T, n, q) for the ids X (T, n), and the final state."""
        inputs = self._inputs(self._beside(X), check_ids=check_ids)
        H, state, _ = self.rnn.forward(inputs, state, check_ids=check_ids)
        return F.linear(H, self._own["W_hq"], self._own.get("b_q")), state

    def step(self, X_t: Ids, state: Floats) -> tuple[Floats, Floats]:
        """Update the state once: ids X_t (n,) → the next state, and O_t (n, q)."""
        X_t = self._beside(X_t, "X_t")
        place = validate.kernels_place(library_of(self._own["W_hq"]))
        O, state = self.forward(validate.array("X_t", X_t, place)[None], state)
        return state, O[0]

    def loss_and_gradients(
        self,
        X: Ids,
        Y: Ids,
        state: Floats | None = None,
        *,
        xi: Floats | None = None,
        noise: tuple[int, int | Ids] | None = None,
        check_ids: bool = True,
        out: Mapping[str, Floats] | None = None,
    ) -> tuple[float, dict[str, Floats], Floats]:
        """One pass forward and back.

        Args:
            X: (T, n) ids. Y: (T, n), the ids one step later.
            state: before the first step; None is zeros. No gradient flows into it.
            xi: (T,) factors that truncate, see ``functional.rnn_backward``; None is full.
            noise: the seed of dropout and the number of the update, which decide what it drops; see
                ``functional.dropout``. None leaves dropout out.
            check_ids: False where ids on a GPU are known to be right, see
                ``functional.rnn_forward``.
            out: arrays that the gradients are written to, by name. None for new ones.

        Returns:
            The mean cross-entropy over all T·n targets, the gradients by name, the final state. On
            a GPU the mean is a float64 array without axes, and nothing waits for it.
        """
        W_hq, b_q, E = self._own["W_hq"], self._own.get("b_q"), self._own.get("E")
        X, Y = self._beside(X), self._beside(Y, "targets")
        inputs = self._inputs(X, check_ids=check_ids)
        H, state, residuals = self.rnn.forward(inputs, state, check_ids=check_ids)
        dropped = noise if self.dropout else None
        if dropped is not None:
            seed, update = dropped
            H = F.dropout(H, self.dropout, seed=seed, update=update)
        outs = None if out is None else (out["W_hq"], out.get("b_q"))
        mean, dH, dW_hq, db_q = F.linear_cross_entropy(
            H, W_hq, b_q, Y, check_ids=check_ids, out=outs
        )
        if dropped is not None:
            dH = F.dropout(dH, self.dropout, seed=seed, update=update)
        dX, _, grads = self.rnn.backward(dH, residuals, xi=xi, out=out)
        grads["W_hq"] = dW_hq
        if b_q is not None:
            grads["b_q"] = db_q
        if E is not None:
            assert dX is not None
            into = None if out is None else out["E"]
            grads["E"] = F.embedding_backward(dX, X, len(E), check_ids=check_ids, out=into)
        return mean, grads, state

    def negative_log_likelihood(
        self, X: Ids, Y: Ids, state: Floats | None = None, *, check_ids: bool = True
    ) -> tuple[Floats, Floats]:
        """−log p of each target Y (T, n) given X (T, n), natural logarithm; and the final state."""
        O, state = self.forward(X, state, check_ids=check_ids)
        Y = self._beside(Y, "targets")
        return F.negative_log_likelihood(O, Y, check_ids=check_ids), state

    def ids_beside(self, ids: Ids) -> Ids:
        """Return ids (…) as an array that lies where the parameters do: int32 on a GPU.

        Raises:
            TypeError, ValueError: they are no ids of the vocabulary.
        """
        size = len(self.vocabulary)
        checked = validate.token_ids("ids", ids, size, "the vocabulary", "tokens")
        if gpu_of(self._own["W_hq"]) is None:
            return checked
        return self._beside(checked.astype(np.int32))

    def encode(self, text: str) -> Ids:
        """Return the ids of a text's tokens; what the vocabulary lacks becomes ``<unk>``."""
        return self.vocabulary.encode(self.tokenizer.tokens(text))

    def evaluate(self, text: str) -> Evaluation:
        """Predict each token of a text from all before it, the state carried from first to last.

        Only the text's tokens grow with its length: states and logits are held a chunk at a time.

        Raises:
            ValueError: fewer than two tokens remain after preprocessing.
        """
        tokens = self.tokenizer.tokens(text)
        if len(tokens) < 2:
            raise ValueError(
                f"text has {len(tokens)} tokens after preprocessing: evaluation needs at least 2"
            )
        found = self.evaluate_ids(self.vocabulary.encode(tokens))
        characters = len(self.tokenizer.join(tokens)) - len(tokens[0])
        return dataclasses.replace(found, characters=characters)

    def evaluate_ids(self, ids: Ids) -> Evaluation:
        """Evaluate ids (N,), N ≥ 2, as ``evaluate`` does a text; characters are not counted."""
        nats, state, unknown, tokens = 0.0, None, 0, 0
        for X, Y in self.stretches(ids):
            nll, state = self.negative_log_likelihood(X, Y, state)
            with home_of(nll):
                nats += float(nll.sum(dtype=np.float64))
            unknown += int(np.count_nonzero(self.vocabulary.unk == Y))
            tokens += len(Y)
        return Evaluation(nats, tokens, None, unknown)

    def stretches(self, ids: Ids) -> Iterator[tuple[Ids, Ids]]:
        """Yield X and Y, each (T, 1), of the stretches in which ``evaluate_ids`` reads (N,) ids.

        Raises:
            TypeError, ValueError: ids is no array of at least two ids.
        """
        checked = validate.text_ids("ids", ids)
        if len(checked) < 2:
            raise ValueError(f"ids has shape {checked.shape}: expected at least 2 tokens")
        chunk = EVALUATION_CHUNK
        if self.device != "cpu":  # a chunk costs a wait
            largest = max(self.rnn.hidden_size, len(self.vocabulary))
            chunk = max(chunk, min(NUMBERS_ON_GPU // largest, 1 << 16))
        for start in range(0, len(checked) - 1, chunk):
            window = checked[start : start + chunk + 1, None]
            yield window[:-1], window[1:]

    def batch_losses(
        self, batches: Iterable[tuple[Ids, Ids]]
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the mean loss of each batch (X, Y), from a zero state, and its tokens."""
        means, tokens = [], []
        for X, Y in batches:
            nll, _ = self.negative_log_likelihood(X, Y)
            with home_of(nll):
                means.append(nll.mean(dtype=np.float64))
            tokens.append(nll.size)
        return tuple(map(float, means)), tuple(tokens)

    def book_perplexity(self, text: str, *, num_steps: int = 32, batch_size: int = 1024) -> float:
        """Return the book's figure: the mean over batches of exp(loss of the batch).

        All stride-1 windows of ``num_steps`` tokens, in order, each from a zero state: what the
        book's plots show. It is no perplexity of the text: see ``perplexity`` for that.

        Raises:
            ValueError: the text is shorter than one window and its target.
        """
        windows = Windows(self.encode(text), num_steps, batch_size, shuffle=False)
        return loss.book_perplexity(self.batch_losses(windows.epoch(np.random.default_rng(0)))[0])

    def perplexity(self, text: str) -> float:
        """Exact perplexity of a text: ``evaluate(text).perplexity``."""
        return self.evaluate(text).perplexity

    def bits_per_character(self, text: str) -> float:
        """Bits per character of a text: ``evaluate(text).bits_per_character``."""
        return self.evaluate(text).bits_per_character

    @overload
    def generate(
        self,
        prefix: str,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        kernel: str | Group | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        prefix: list[str] | tuple[str, ...],
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        kernel: str | Group | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        prefix: str | list[str] | tuple[str, ...],
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        kernel: str | Group | None = None,
    ) -> str | list[str]:
        """Continue a text by n tokens, or each of several.

        The prefix is preprocessed like the training text and warms up the state. Characters that
        are outside the vocabulary even then are read as ``<unk>``, with a warning that names them.
        ``<unk>`` and reserved tokens are never generated.

        Where the parameters lie on a GPU, all of it is one launch, of as many texts as run at once.
        One seed gives one text, on a GPU that of NumPy, but where rounding decides. Texts differ by
        their row: the first of several is what its prefix alone gives.

        Args:
            prefix: a text of at least one token, or several.
            n: how many tokens to add.
            temperature, top_k, top_p, seed: see ``sampling.TokenSampler``; temperature 0 is greedy.
            kernel: see ``generated``.

        Returns:
            The prefix as given, then the continuation; a list of such for several.

        Raises:
            ValueError: an empty prefix, n below 0, a setting out of range, or a kernel that cannot
                be.
        """
        validate.at_least("n", n, 0)
        sampler = TokenSampler(temperature, top_k, top_p, self.vocabulary.reserved_ids, seed)
        texts = [prefix] if isinstance(prefix, str) else prefix
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"prefix is {prefix!r}: expected a text, or a list of texts")
        ids = []
        for text in texts:
            ids.append(self.encode_prefix(text))  # noqa: PERF401 (its warning names the caller)
        rows = self.generated(ids, n, sampler, kernel)
        found = [self.continued(text, row) for text, row in zip(texts, rows, strict=True)]
        return found[0] if isinstance(prefix, str) else found

    def generated(
        self,
        prefixes: Sequence[Ids],
        n: int,
        sampler: TokenSampler,
        kernel: str | Group | None = None,
    ) -> Ids:
        """Return (rows, n) ids: each prefix (N,), N ≥ 1, continued by n tokens.

        Token i of row r is drawn by the sampler's number (count + i, r), and the count moves on by
        n: what a row holds depends on no other row.

        Args:
            prefixes: ids, in the host's memory as what is returned.
            n: how many tokens, 0 or more.
            sampler: how they are drawn.
            kernel: where the parameters lie on a GPU, or under the emulator: "resident" (a block a
                row, all weights in it), "streamed" (what it cannot hold is read in each step) or
                "group" (several blocks a row, each with a part of W_hh: one layer, float32), or a
                ``gpurnn.Group``; None chooses. All are one launch, of as many rows as run at once.

        Raises:
            TypeError, ValueError: an argument is out of range, a kernel is named without a GPU or
                cannot hold the model, or logits are NaN or infinite.
        """
        return generation.generated(self, prefixes, n, sampler, kernel)

    def encode_prefix(self, prefix: str) -> Ids:
        """Return the ids of a prefix (N,), N ≥ 1; warn of what the vocabulary lacks.

        Blanks at its end are part of it, also where an edition strips them from the end of a text.
        """
        if self.tokenizer.unit == "char":
            tokens = self.tokenizer.tokens(prefix + "x")[:-1]
        else:
            tokens = self.tokenizer.tokens(prefix)
        if not tokens:
            raise ValueError(
                f"prefix {prefix!r} holds no token after preprocessing: expected at least one"
            )
        unknown = sorted({token for token in tokens if token not in self.vocabulary})
        if unknown:
            named = ", ".join(map(repr, unknown))
            warnings.warn(f"not in the vocabulary, read as <unk>: {named}", stacklevel=3)
        return self.vocabulary.encode(tokens)

    def continued(self, prefix: str, ids: Iterable[int]) -> str:
        """Return the prefix as given, then the tokens of ``ids`` as the tokenizer joins them."""
        text = self.tokenizer.join(self.vocabulary.decode(np.fromiter(ids, dtype=np.int64)))
        separator = self.tokenizer.separator if text and not prefix[-1:].isspace() else ""
        return prefix + separator + text

    def generate_ids(self, prefix: Ids, n: int, sampler: TokenSampler) -> Iterator[int]:
        """Yield n ids, each drawn on the host given the prefix (N,) and all drawn before it.

        On a GPU each is a round trip: ``generated`` has none.
        """
        return generation.continuation(self, prefix, n, sampler.draw)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        params: Mapping[str, Floats] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model, whole or not at all.

        Args:
            path: the file.
            params: parameters to write instead of the current ones.
            about: any JSON to keep with the model, such as what it was trained on.

        Raises:
            OSError: the file could not be written; one of that name is as it was.
            ValueError: the activation is one of the user's own, see ``config``.
        """
        chosen = self.params if params is None else params
        arrays = {name: on_host(p) for name, p in chosen.items()}
        document = {"model": self.config(), "about": dict(about or {})}
        checkpoint.write(path, checkpoint.Contents("model", arrays, document))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a model that ``save`` wrote.

        Raises:
            CheckpointError: the file is missing, truncated, foreign or changed, and why.
        """
        contents = checkpoint.read(path, "model")
        try:
            model = cls.from_config(contents.document["model"], contents.arrays)
            model.about = contents.document["about"]
            return model
        except (KeyError, TypeError, ValueError) as e:
            raise checkpoint.CheckpointError(f"{path} holds no usable model: {e}") from e

    def config(self) -> dict[str, Any]:
        """Return all but the parameters, as JSON.

        Raises:
            ValueError: the activation is one of the user's own: functions are no data.
        """
        activation = self.rnn.activation
        if isinstance(activation, Activation):
            raise ValueError(
                f"activation is {activation!r}, made of Python functions, which a file cannot hold:"
                " expected one that has a name (keep params, and build the model in your program)"
            )
        return {
            "tokenizer": self.tokenizer.config(),
            "tokens": list(self.vocabulary.tokens),
            "num_reserved": self.vocabulary.num_reserved,
            "hidden_size": self.rnn.hidden_size,
            "num_layers": self.rnn.num_layers,
            "activation": activation,
            "bias": self.rnn.bias,
            "embedding_size": self.embedding_size,
            "dropout": self.dropout,
            "dtype": self.rnn.dtype.name,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], params: Mapping[str, Floats]) -> Self:
        """Build a model from ``config()`` and its parameters."""
        options = dict(config)
        tokenizer = Tokenizer.from_config(options.pop("tokenizer"))
        vocabulary = Vocabulary.from_tokens_in_order(
            options.pop("tokens"), num_reserved=options.pop("num_reserved")
        )
        model = cls(vocabulary, tokenizer, **options)
        model.load_params(params)
        return model

    def load_params(self, params: Mapping[str, Floats]) -> None:
        """Copy parameters in; names, shapes and dtype must be this model's, all values finite.

        Raises:
            TypeError, ValueError: they are not; then nothing has been copied.
        """
        own = self.params
        if set(params) != set(own):
            raise ValueError(f"parameters {sorted(params)}: expected {sorted(own)}")
        given = {name: on_host(params[name]) for name in own}
        checked = {name: validate.like(name, given[name], name, own[name]) for name in own}
        validate.refuse_non_finite(checked)
        for name, a in checked.items():
            with home_of(own[name]):
                own[name][...] = beside(a, own[name])

    def _inputs(self, X: Ids, *, check_ids: bool = True) -> Floats | Ids:
        E = self._own.get("E")
        if E is None:
            return X
        return F.embedding(X, E, check_ids=check_ids)

    def _beside(self, ids: Ids, name: str = "X") -> Ids:
        """Return ids in the memory where the parameters lie; what are none are left to be refused.

        Raises:
            TypeError: they are to be copied to a GPU, and are no array of integers.
        """
        if gpu_of(self._own["W_hq"]) is None or on_gpu(ids):
            return ids
        checked = validate.integers(name, ids)
        there: Ids = beside(checked, self._own["W_hq"])
        return there
