"""A run with its files: started, saved as it goes, interrupted, resumed, finished."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpurnn import checkpoint, validate
from gpurnn.files import write_atomically
from gpurnn.text import load_corpus
from gpurnn.training.config import TrainingConfig
from gpurnn.training.curves import plot_curves
from gpurnn.training.interrupts import noticed_interrupts
from gpurnn.training.run import Run, prepare
from gpurnn.training.trainer import TrainingDiverged

__all__ = ["RunFiles", "SaveError", "Session", "resume", "start"]


class SaveError(OSError):
    """A file of the run could not be written; ``filename`` and ``strerror`` say which and why."""


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, all beside ``model``."""

    model: Path

    @classmethod
    def beside(cls, out: str | os.PathLike[str]) -> "RunFiles":
        """Return the files of the run whose model goes to ``out`` (a name ending in .safetensors).

        Raises:
            ValueError: ``out`` is a folder, or has another suffix.
        """
        path = Path(out)
        if path.is_dir():
            raise ValueError(f"out is the folder {path}: expected a file name")
        if path.suffix != ".safetensors":
            raise ValueError(f"out is {path}: expected a name that ends in .safetensors")
        return cls(path)

    def __iter__(self) -> Iterator[Path]:
        """All of them."""
        return iter((self.model, self.training, self.history, self.curves))

    @property
    def training(self) -> Path:
        """The checkpoint: whole state of the run, to resume from."""
        return self.model.with_suffix(".training.safetensors")

    @property
    def history(self) -> Path:
        """One JSON record a line, one line an epoch."""
        return self.model.with_suffix(".history.jsonl")

    @property
    def curves(self) -> Path:
        """Training and validation perplexity by epoch, a PNG."""
        return self.model.with_suffix(".curves.png")


class Session:
    """Drives a ``Run`` and keeps its files up to date.

    The checkpoint is written when ``save_every`` seconds have passed since the last one, when the
    run is interrupted and when it ends; the model file (the best parameters so far), the history
    and the curves after it. Each write replaces a file at once or not at all, so a run that is
    killed at any moment goes on from the last checkpoint, and its model file ends with the same
    bytes as that of a run never killed.
    """

    def __init__(self, run: Run, files: RunFiles, *, save_every: float = 15.0) -> None:
        self.run = run
        self.files = files
        self.save_every = save_every
        self._saved_at = time.monotonic()
        self._complete = False

    def train(
        self,
        on_step: Callable[[], None] = lambda: None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        *,
        ahead: bool | None = None,
    ) -> int | None:
        """Train to the end or to an interrupt; then the model holds the best parameters.

        Args:
            on_step: called after every update.
            on_epoch: called after every epoch with its record.
            ahead: see ``Trainer.run``.

        Returns:
            None when the run is finished and its files are complete; the number of the signal
            when it was interrupted, with everything saved.

        Raises:
            TrainingDiverged: see ``Trainer.run``. The files tell of the run up to there.
            SaveError: a file could not be written; the files on disk are whole, if older.
        """
        trainer = self.run.trainer
        if self._complete:  # the model holds the best parameters, not those to go on from
            return None
        with noticed_interrupts() as interrupts:
            self.save()  # an unwritable place is found before the work, not after
            if not trainer.progress.step:
                self._remove_earlier_results()

            def after_step() -> bool:
                on_step()
                if time.monotonic() - self._saved_at >= self.save_every:
                    self.save()
                return interrupts.signal is None

            try:
                finished = trainer.run(after_step, on_epoch, ahead=ahead)
            except SaveError:
                raise
            except (TrainingDiverged, OSError) as e:  # OSError: nobody to tell the progress to
                try:
                    self.save(with_curves=True)
                except SaveError as unsaved:
                    raise e from unsaved
                raise
            self.save(with_curves=True)
            if not finished:
                return interrupts.signal
        trainer.keep_best()
        self._complete = True
        return None

    def _remove_earlier_results(self) -> None:
        """Remove what an earlier run left: it would be taken for this one's."""
        for path in (self.files.model, self.files.history, self.files.curves):
            try:
                Path(os.path.realpath(path)).unlink(missing_ok=True)
            except OSError as e:
                raise _save_error(e) from e

    def save(self, *, with_curves: bool = False) -> None:
        """Write the checkpoint; then model and history, if there is an epoch to tell of."""
        trainer, corpus = self.run.trainer, self.run.corpus
        contents = trainer.contents()
        contents.document["corpus"] = corpus.about()
        try:
            checkpoint.write(self.files.training, contents)
            if trainer.history:
                self.run.model.save(self.files.model, params=trainer.best, about=self.run.about())
                lines = (json.dumps(record, allow_nan=False) for record in trainer.history)
                write_atomically(self.files.history, "".join(f"{x}\n" for x in lines).encode())
                if with_curves:
                    title = Path(corpus.name).name
                    plot_curves(trainer.history, self.files.curves, title=title)
        except OSError as e:
            raise _save_error(e) from e
        self._saved_at = time.monotonic()


def _save_error(e: OSError) -> SaveError:
    return SaveError(e.errno, e.strerror or str(e), e.filename)


def start(
    config: TrainingConfig,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    save_every: float = 15.0,
    device: str = "cpu",
) -> Session:
    """Prepare a new run whose model goes to ``out``.

    Raises:
        FileExistsError: a file of an earlier run is there and ``overwrite`` is False.
        ValueError: one of the four names is taken by something other than a file; also see
            ``prepare`` and ``RunFiles.beside``.
    """
    files = RunFiles.beside(out)
    for path in files:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} exists and is not a file: give another --out")
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists: resume that run (--resume), replace it (--overwrite), or give "
                "another --out"
            )
    return Session(prepare(config, device=device), files, save_every=save_every)


def resume(
    out: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    save_every: float = 15.0,
    device: str = "cpu",
) -> Session:
    """Take up the run whose model goes to ``out``, from its checkpoint.

    Args:
        out: as it was given to ``start``.
        epochs: go on to so many instead of those the run was started with. A learning rate that
            falls over the run then falls over the new length.
        device: where to go on, see ``prepare``; it may be another one than before.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or the text is no longer the same.
        ValueError: fewer epochs than the run has completed.
        CorpusError: the corpus cannot be had.
    """
    files = RunFiles.beside(out)
    contents = checkpoint.read(files.training, "training")
    try:
        config = TrainingConfig.from_json(contents.document["config"])
        before = contents.document["corpus"]["sha256"]
        done = contents.document["progress"]["epoch"]
    except (KeyError, TypeError, ValueError) as e:
        raise checkpoint.CheckpointError(f"{files.training} holds no usable run: {e!r}") from e
    if epochs is not None:
        validate.positive("epochs", epochs)
        if epochs < done:
            raise ValueError(f"epochs is {epochs}: the run has completed {done} already")
        config = dataclasses.replace(config, epochs=epochs)
    corpus = load_corpus(config.corpus)
    if corpus.sha256 != before:
        raise checkpoint.CheckpointError(
            f"{files.training} was trained on a text with sha256 {before}, but "
            f"{corpus.name} ({corpus.origin}) now has {corpus.sha256}"
        )
    run = prepare(config, corpus, device=device)
    run.trainer.restore(contents)
    return Session(run, files, save_every=save_every)
