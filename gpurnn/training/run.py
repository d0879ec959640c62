"""From settings to a run: text, batches, model, and the counting baselines of the same split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import loss
from gpurnn.batches import RandomPartition, Sampler, SequentialPartition, Windows, split
from gpurnn.language_model import LanguageModel
from gpurnn.ngram import NGramModel
from gpurnn.text import Corpus, Tokenizer, Vocabulary, load_corpus, training_text
from gpurnn.training.config import TrainingConfig
from gpurnn.training.trainer import Trainer
from gpurnn.training.validation import StreamValidation, Validation, WindowValidation

__all__ = ["Run", "ngram_perplexities", "prepare"]

Ids = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """All that ``prepare`` makes of a ``TrainingConfig``.

    ``train_ids`` and ``valid_ids`` are the tokens that the training batches and the validation
    cover (``valid_ids`` is empty without validation).
    """

    config: TrainingConfig
    corpus: Corpus
    trainer: Trainer
    train_ids: Ids
    valid_ids: Ids

    @property
    def model(self) -> LanguageModel:
        """The model being trained."""
        return self.trainer.model

    def about(self) -> dict[str, Any]:
        """Return what a model file tells of its origin: no times, so that equal runs are equal."""
        p = self.trainer.progress
        return {
            "corpus": self.corpus.name,
            "origin": self.corpus.origin,
            "sha256": self.corpus.sha256,
            "config": self.config.as_json(),
            "epoch": p.best_epoch,
            "validation_loss": p.best_loss,
        }


_SAMPLERS: dict[str, Callable[[Ids, int, int], Sampler]] = {
    "windows": Windows,
    "random": RandomPartition,
    "sequential": SequentialPartition,
}


def prepare(config: TrainingConfig, corpus: Corpus | None = None, *, device: str = "cpu") -> Run:
    """Load and cut the text, build vocabulary, batches, validation and the initial model.

    The vocabulary is that of the whole text, as in the book. ``device`` is where the model is
    trained, see ``LanguageModel.to``; the initial weights are the same everywhere.

    Raises:
        CorpusError: the corpus cannot be had.
        ValueError: the text is too short for the settings, or the device is not there.
        ImportError: a package that the device needs is not installed.
    """
    if corpus is None:
        corpus = load_corpus(config.corpus)
    tokenizer = Tokenizer(config.unit, config.edition)
    tokens = tokenizer.tokens(training_text(corpus.text, config.edition))
    if not tokens:
        raise ValueError(f"corpus {corpus.name!r} holds no token after preprocessing")
    vocabulary = Vocabulary(tokens, min_freq=config.min_freq)
    ids: Ids = vocabulary.encode(tokens)[: config.max_tokens]
    train_ids: Ids
    valid_ids: Ids
    T, n = config.num_steps, config.batch_size
    validation: Validation | None = None
    sampler: Sampler
    if config.train_windows is not None and config.valid_windows is not None:
        first = config.train_windows
        sampler = Windows(ids, T, n, count=first)
        held_out = Windows(ids, T, n, shuffle=False, start=first, count=config.valid_windows)
        validation = WindowValidation(held_out)
        train_ids = ids[: first + T - 1]
        valid_ids = ids[first : first + config.valid_windows + T - 1]
    else:
        train_ids, valid_ids = ids, ids[:0]
        if config.valid_fraction:
            train_ids, valid_ids = split(ids, 1 - config.valid_fraction)
            if len(valid_ids) < 2:
                raise ValueError(
                    f"valid_fraction {config.valid_fraction} of {len(ids)} tokens leaves "
                    f"{len(valid_ids)} to validate on: expected at least 2"
                )
            validation = StreamValidation(valid_ids)
        try:
            sampler = _SAMPLERS[config.sampling](train_ids, T, n)
        except ValueError as e:  # say it in the names of the settings
            raise ValueError(f"{e} (T is num_steps, n is batch_size)") from e
    model = LanguageModel(
        vocabulary,
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        activation=config.activation,
        embedding_size=config.embedding_size,
        dropout=config.dropout,
        dtype=np.dtype(config.dtype),
        init=config.init,
        seed=config.seed,
    ).to(device)
    trainer = Trainer(model, sampler, config, validation)
    return Run(config, corpus, trainer, train_ids, valid_ids)


def ngram_perplexities(run: Run, orders: tuple[int, ...] = (1, 2, 5)) -> dict[int, float]:
    """Return the validation perplexity of Witten-Bell n-grams counted on the same training text.

    They predict exactly the tokens that the network does, from no more history than it has: within
    its window where each window starts afresh, else all from the first token of the stream.

    Raises:
        ValueError: the run has no validation text.
    """
    if not len(run.valid_ids):
        raise ValueError("the run has no validation text (valid_fraction is 0)")
    found = {}
    for order in orders:
        ngram = NGramModel(order, len(run.model.vocabulary)).fit(run.train_ids)
        if isinstance(run.trainer.validation, WindowValidation):
            windows = run.trainer.validation.windows
            found[order] = ngram.perplexity_windows(windows.X, windows.Y)
        else:
            found[order] = loss.perplexity(ngram.negative_log_likelihood(run.valid_ids)[1:])
    return found
