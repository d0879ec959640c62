"""Runs with their files: saved, killed, interrupted, resumed, out of room, to the same bits."""

import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpurnn import checkpoint
from gpurnn.checkpoint import CheckpointError, Contents
from gpurnn.language_model import LanguageModel
from gpurnn.text import CorpusError
from gpurnn.training import session as session_module
from gpurnn.training.config import TrainingConfig
from gpurnn.training.session import RunFiles, SaveError, Session, resume, start
from gpurnn.training.trainer import TrainingDiverged

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")

CONSOLE = Path(sysconfig.get_path("scripts"), "gpurnn")
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text of 400 letters."""
    steps = np.random.default_rng(0).choice(4, 400, p=[0.6, 0.2, 0.1, 0.1])
    path = tmp_path / "text.txt"
    path.write_text("".join("abcdef "[i] for i in np.cumsum(steps) % 7), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the model goes, in a folder of its own."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder / "model.safetensors"


def tiny(corpus: Path, **changes: Any) -> TrainingConfig:
    """Everything that a checkpoint must bring back: carried state, moments, noise, best epoch."""
    config = TrainingConfig(
        corpus=str(corpus),
        sampling="sequential",
        num_steps=6,
        batch_size=12,
        valid_fraction=0.2,
        hidden_size=5,
        dropout=0.2,
        epochs=4,
        optimizer="adamw",
        lr=0.05,
        schedule="cosine",
        warmup=3,
        clip=1.0,
        bptt="randomized",
        tau=3,
        seed=1,
    )
    return dataclasses.replace(config, **changes)


def history_without_times(files: RunFiles) -> list[dict[str, Any]]:
    """Parse the history, as strictly as JSON is defined."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    lines = files.history.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    for record in records:
        del record["seconds"], record["tokens_per_second"]
    return records


def training_without_times(files: RunFiles) -> tuple[dict[str, Any], dict[str, Any]]:
    contents = checkpoint.read(files.training, "training")
    progress = contents.document["progress"]
    for timed in (progress, *progress["history"]):
        for name in ("seconds", "epoch_seconds", "tokens_per_second"):
            timed.pop(name, None)
    return {k: (a.dtype.str, a.tolist()) for k, a in contents.arrays.items()}, contents.document


def assert_readable(files: RunFiles) -> int:
    """Require every file on the disk to be whole, and none ahead of the checkpoint.

    Returns:
        The number of updates that the checkpoint holds; −1 where there is none yet.
    """
    for path in files.model.parent.iterdir():
        known = (files.model, files.training, files.history, files.curves)
        assert path in known or path.name in {f".{p.name}.new" for p in known}, path
    if not files.training.exists():
        assert not files.model.exists() and not files.history.exists()
        return -1
    progress = checkpoint.read(files.training, "training").document["progress"]
    if files.model.exists():
        about = LanguageModel.load(files.model).about
        assert 1 <= about["epoch"] <= progress["epoch"]
    if files.history.exists():
        epochs = [record["epoch"] for record in history_without_times(files)]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) <= progress["epoch"]
    if files.curves.exists():
        assert files.curves.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return int(progress["step"])


def assert_same_result(files: RunFiles, expected: RunFiles) -> None:
    """Require the same bits as a run that nothing happened to."""
    assert history_without_times(files) == history_without_times(expected)
    assert training_without_times(files) == training_without_times(expected)
    model, expected_model = (LanguageModel.load(f.model) for f in (files, expected))
    assert model.about == expected_model.about
    for name, a in expected_model.params.items():
        assert model.params[name].tobytes() == a.tobytes(), name
    assert files.model.read_bytes() == expected.model.read_bytes()
    assert files.curves.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def uninterrupted(config: TrainingConfig, folder: Path) -> RunFiles:
    folder.mkdir()
    session = start(config, folder / "model.safetensors")
    assert session.train() is None
    return session.files


# The files of a run


@pytest.mark.parametrize("kind", [str, Path])
def test_names_of_the_files(kind: type) -> None:
    files = RunFiles.beside(kind("runs/a.b.safetensors"))
    assert files.model == Path("runs/a.b.safetensors")
    assert files.training == Path("runs/a.b.training.safetensors")
    assert files.history == Path("runs/a.b.history.jsonl")
    assert files.curves == Path("runs/a.b.curves.png")


@pytest.mark.parametrize(
    "name", ["model", "model.pt", "model.safetensors.bak", ".safetensors", "model.SAFETENSORS"]
)
def test_another_suffix_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a name that ends in"):
        RunFiles.beside(name)


def test_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"the folder {re.escape(str(folder))}: expected a file"):
        RunFiles.beside(folder)


def test_files_of_a_finished_run(corpus: Path, out: Path) -> None:
    session = start(tiny(corpus), out)
    trainer = session.run.trainer
    assert session.train() is None
    files = session.files
    assert {path.name for path in out.parent.iterdir()} == {
        "model.safetensors",
        "model.training.safetensors",
        "model.history.jsonl",
        "model.curves.png",
    }
    assert trainer.finished
    assert assert_readable(files) == trainer.progress.step
    lines = files.history.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == trainer.history
    model = LanguageModel.load(out)
    assert model.about == session.run.about()
    assert model.about["config"] == session.run.config.as_json()
    for name, a in trainer.best.items():
        assert model.params[name].tobytes() == a.tobytes()
        assert session.run.model.params[name].tobytes() == a.tobytes()  # train keeps the best


def test_equal_runs_have_equal_model_files(corpus: Path, tmp_path: Path) -> None:
    files = [uninterrupted(tiny(corpus), tmp_path / name) for name in "abc"]
    assert len({f.model.read_bytes() for f in files}) == 1


def test_model_on_the_disk_is_the_best_so_far(corpus: Path, out: Path) -> None:
    session = start(tiny(corpus, epochs=20, hidden_size=12), out, save_every=0)
    trainer = session.run.trainer
    best_epochs = set()

    def on_step() -> None:  # what is on the disk was saved after the update before
        if trainer.progress.batch == 2 and trainer.history:
            model = LanguageModel.load(out)
            best_epochs.add(model.about["epoch"])
            assert model.about["epoch"] == trainer.progress.best_epoch
            for name, a in trainer.best.items():
                assert model.params[name].tobytes() == a.tobytes()
            assert len(history_without_times(session.files)) == trainer.progress.epoch

    session.train(on_step)
    assert 1 < len(best_epochs) < 19  # it got better, and then worse: it has learned by heart


def test_before_the_first_epoch_ends_there_is_only_the_checkpoint(corpus: Path, out: Path) -> None:
    session = start(tiny(corpus), out, save_every=0)
    seen: list[list[str]] = []
    session.train(lambda: seen.append(sorted(p.name for p in out.parent.iterdir())))
    assert seen[:4] == [["model.training.safetensors"]] * 4
    assert seen[5] == ["model.history.jsonl", "model.safetensors", "model.training.safetensors"]


@pytest.mark.parametrize(
    ("save_every", "saved_at"),
    [
        (0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]),
        (3.0, [0, 3, 6, 8]),
        (3.5, [0, 4, 8, 8]),
        (1e9, [0, 8]),
        (float("inf"), [0, 8]),
    ],
)
def test_checkpoints_come_by_the_clock(
    save_every: float,
    saved_at: list[int],
    corpus: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(session_module, "time", SimpleNamespace(monotonic=lambda: now))
    session = start(tiny(corpus, epochs=2), out, save_every=save_every)
    progress = session.run.trainer.progress
    saved: list[int] = []
    write = checkpoint.write

    def recorded(path: Path, contents: Contents) -> None:
        if contents.kind == "training":
            saved.append(contents.document["progress"]["step"])
        write(path, contents)

    def tick() -> None:
        nonlocal now
        now += 1

    monkeypatch.setattr(checkpoint, "write", recorded)
    session.train(tick)
    assert progress.step == 8
    assert saved == saved_at


def test_what_is_there_is_not_replaced_unasked(corpus: Path, out: Path) -> None:
    files = uninterrupted(tiny(corpus, epochs=1), out.parent / "earlier")
    for path in files:
        there = out.parent / path.name
        there.write_bytes(path.read_bytes())
        with pytest.raises(FileExistsError, match=re.escape(str(there))) as caught:
            start(tiny(corpus), out)
        assert re.search("resume.*overwrite|overwrite.*resume", str(caught.value))
        assert there.read_bytes() == path.read_bytes()
        there.unlink()


def test_overwrite_replaces_an_earlier_run(corpus: Path, out: Path, tmp_path: Path) -> None:
    start(tiny(corpus, hidden_size=7, seed=5), out).train()
    session = start(tiny(corpus), out, overwrite=True)
    assert session.train() is None
    assert_same_result(session.files, uninterrupted(tiny(corpus), tmp_path / "alone"))


def test_overwrite_leaves_nothing_of_an_earlier_run(corpus: Path, out: Path) -> None:
    start(tiny(corpus, hidden_size=7, seed=5), out).train()
    session = start(tiny(corpus), out, overwrite=True)
    assert session.train(raising(1, session, signal.SIGINT)) == signal.SIGINT
    assert [p.name for p in out.parent.iterdir()] == ["model.training.safetensors"]


def test_start_without_a_usable_text(corpus: Path, out: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        start(tiny(corpus.parent / "nowhere.txt"), out)
    with pytest.raises(ValueError, match="tokens"):
        start(tiny(corpus, num_steps=300), out)
    assert list(out.parent.iterdir()) == []


def test_unwritable_place_is_found_before_the_work(corpus: Path, tmp_path: Path) -> None:
    session = start(tiny(corpus), tmp_path / "missing" / "model.safetensors")
    with pytest.raises(SaveError) as caught:
        session.train()
    assert session.run.trainer.progress.step == 0
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "missing" / "model.training.safetensors")


def test_perplexity_beyond_all_numbers(corpus: Path, out: Path) -> None:
    """A loss of 1,000 nats is finite, its perplexity is not; files and curves must bear it."""
    config = tiny(
        corpus,
        sampling="random",
        optimizer="sgd",
        lr=1e4,
        clip=None,
        dropout=0.0,
        bptt="full",
        tau=None,
        schedule="constant",
        warmup=0,
        epochs=2,
    )
    session = start(config, out)
    assert session.train() is None
    losses = [record["valid_loss"] for record in session.run.trainer.history]
    assert max(losses) > 710  # e^710 is beyond float64
    assert np.isfinite(losses).all()
    assert [record["valid_loss"] for record in history_without_times(session.files)] == losses
    assert_readable(session.files)


# Interrupted


def raising(at_step: int, session: Session, *signals: signal.Signals) -> Callable[[], None]:
    def on_step() -> None:
        if session.run.trainer.progress.step == at_step:
            for number in signals:
                signal.raise_signal(number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 16])
def test_interrupted_run_goes_on_to_the_same_bits(
    number: signal.Signals, step: int, corpus: Path, out: Path, tmp_path: Path
) -> None:
    config = tiny(corpus)
    session = start(config, out, save_every=1e9)
    assert session.train(raising(step, session, number)) == number
    assert assert_readable(session.files) == step
    assert session.files.curves.exists() == (step > 4)
    again = resume(out)
    assert again.run.trainer.progress.step == step
    assert again.run.config == config
    assert again.train() is None
    assert_same_result(again.files, uninterrupted(config, tmp_path / "alone"))


def test_interrupted_again_and_again(corpus: Path, out: Path, tmp_path: Path) -> None:
    session = start(tiny(corpus), out, save_every=1e9)
    for step in (1, 2, 3, 8, 11, 16):
        assert session.train(raising(step, session, signal.SIGINT)) == signal.SIGINT
        session = resume(out)
        assert session.run.trainer.progress.step == step
    assert session.train() is None
    assert_same_result(session.files, uninterrupted(tiny(corpus), tmp_path / "alone"))


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)]
)
def test_second_interrupt_stops_at_once(
    numbers: tuple[signal.Signals, ...], corpus: Path, out: Path, tmp_path: Path
) -> None:
    session = start(tiny(corpus), out, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        session.train(raising(6, session, *numbers))
    assert assert_readable(session.files) == 5
    again = resume(out)
    assert again.train() is None
    assert_same_result(again.files, uninterrupted(tiny(corpus), tmp_path / "alone"))


@posix
@pytest.mark.parametrize("number_of_fsync", range(1, 7))
def test_second_interrupt_while_saving(
    number_of_fsync: int,
    corpus: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = start(tiny(corpus), out, save_every=0)
    flush, flushed = os.fsync, 0

    def interrupting(descriptor: int) -> None:
        nonlocal flushed
        flush(descriptor)
        if session.run.trainer.progress.step == 6:
            flushed += 1
            if flushed == number_of_fsync:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupting)
        with pytest.raises(KeyboardInterrupt):
            session.train(raising(6, session, signal.SIGINT))
    assert flushed == number_of_fsync
    assert assert_readable(session.files) in (5, 6)
    assert not list(out.parent.glob(".*"))  # unlike a kill, it leaves nothing behind
    again = resume(out)
    assert again.train() is None
    assert_same_result(again.files, uninterrupted(tiny(corpus), tmp_path / "alone"))


@pytest.mark.parametrize("ending", ["finished", "interrupted", "stopped", "failed"])
def test_handlers_are_put_back(ending: str, corpus: Path, out: Path) -> None:
    def mine(number: int, frame: object) -> None:
        raise InterruptedError(number)

    def fail() -> None:
        raise ZeroDivisionError

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    session = start(tiny(corpus, epochs=1), out)
    try:
        for number in before:
            signal.signal(number, mine)
        if ending == "finished":
            assert session.train() is None
        elif ending == "interrupted":
            assert session.train(raising(1, session, signal.SIGTERM)) == signal.SIGTERM
        elif ending == "stopped":
            with pytest.raises(InterruptedError):  # the second goes to who was there before
                session.train(raising(1, session, signal.SIGTERM, signal.SIGTERM))
        else:
            with pytest.raises(ZeroDivisionError):
                session.train(fail)
        assert {number: signal.getsignal(number) for number in before} == dict.fromkeys(
            before, mine
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_trains_in_another_thread(corpus: Path, out: Path, tmp_path: Path) -> None:
    session = start(tiny(corpus), out)
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(session.train()))
    thread.start()
    thread.join()
    assert result == [None]
    assert_same_result(session.files, uninterrupted(tiny(corpus), tmp_path / "alone"))


def test_diverged_run_has_its_files(corpus: Path, out: Path) -> None:
    session = start(tiny(corpus), out, save_every=1e9)
    trainer = session.run.trainer

    def spoil() -> None:
        if trainer.progress.step == 10:
            trainer.model.params["W_hh"][0, 0] = np.nan

    with pytest.raises(TrainingDiverged, match=r"at update 11 \(epoch 3\)"):
        session.train(spoil)
    assert len(history_without_times(session.files)) == 2
    assert all(path.exists() for path in session.files)
    assert LanguageModel.load(out).about["epoch"] == trainer.progress.best_epoch


# Resumed


def test_finished_run_resumed_is_finished(corpus: Path, out: Path, tmp_path: Path) -> None:
    alone = uninterrupted(tiny(corpus), tmp_path / "alone")
    start(tiny(corpus), out).train()
    session = resume(out)
    assert session.train(on_step=pytest.fail) is None
    assert_same_result(session.files, alone)


def test_resumed_for_more_epochs(corpus: Path, out: Path, tmp_path: Path) -> None:
    config = tiny(corpus, schedule="constant", warmup=0)
    start(config, out).train()
    session = resume(out, epochs=7)
    assert session.run.config == dataclasses.replace(config, epochs=7)
    assert session.train() is None
    longer = uninterrupted(dataclasses.replace(config, epochs=7), tmp_path / "alone")
    assert_same_result(session.files, longer)
    assert resume(out, epochs=7).run.trainer.finished
    with pytest.raises(ValueError, match="epochs is 6: the run has completed 7 already"):
        resume(out, epochs=6)
    with pytest.raises(ValueError, match="epochs is 0: expected at least 1"):
        resume(out, epochs=0)


def interrupted(corpus: Path, out: Path) -> RunFiles:
    session = start(tiny(corpus), out)
    session.train(raising(6, session, signal.SIGINT))
    return session.files


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1] + "x",
        lambda text: text + "a",
        lambda text: text.upper(),
        lambda text: text[:30],
        lambda text: "x",
    ],
    ids=["one-letter", "longer", "case", "short", "one-token"],
)
def test_changed_corpus_is_refused(change: Callable[[str], str], corpus: Path, out: Path) -> None:
    files = interrupted(corpus, out)
    before = checkpoint.read(files.training, "training").document["corpus"]["sha256"]
    corpus.write_text(change(corpus.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        resume(out)
    message = str(caught.value)
    assert str(files.training) in message
    assert before in message
    assert str(corpus) in message


def test_missing_corpus_is_named(corpus: Path, out: Path) -> None:
    interrupted(corpus, out)
    corpus.unlink()
    with pytest.raises(CorpusError, match=re.escape(repr(str(corpus)))):
        resume(out)


def test_nothing_to_resume(out: Path) -> None:
    expected = re.escape(f"{out.with_suffix('.training.safetensors')} does not exist")
    with pytest.raises(CheckpointError, match=expected):
        resume(out)


def test_damaged_checkpoint_is_not_resumed(corpus: Path, out: Path) -> None:
    files = interrupted(corpus, out)
    whole = files.training.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        files.training.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(str(files.training))):
            resume(out)
    files.training.write_bytes(files.model.read_bytes())
    with pytest.raises(CheckpointError, match="is a model file, not a training file"):
        resume(out)


def rewritten(path: Path, change: Callable[[Contents], object]) -> None:
    """Change a checkpoint as another version of the program could have written it."""
    contents = checkpoint.read(path, "training")
    change(contents)
    checkpoint.write(path, contents)


def left_out(name: str, *path: str) -> Callable[[Contents], object]:
    def change(contents: Contents) -> None:
        there: dict[str, Any] = getattr(contents, name)
        for step in path[:-1]:
            there = there[step]
        del there[path[-1]]

    return change


@pytest.mark.parametrize(
    "path",
    [
        *(("document", name) for name in ("config", "model", "sampler", "progress", "random")),
        ("document", "corpus"),
        ("document", "corpus", "sha256"),
        ("document", "random", "batches"),
        ("arrays", "model.W_hh"),
        ("arrays", "best.W_hh"),
        ("arrays", "optimizer.m.W_hh"),
    ],
    ids="-".join,
)
def test_checkpoint_that_lacks_something_is_not_resumed(
    path: tuple[str, ...], corpus: Path, out: Path
) -> None:
    files = interrupted(corpus, out)
    rewritten(files.training, lambda contents: None)
    assert resume(out).run.trainer.progress.step == 6
    rewritten(files.training, left_out(*path))
    with pytest.raises(CheckpointError):
        resume(out)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("config", {"colour": "red"}),
        ("config", {"epochs": "many"}),
        ("progress", {"colour": "red"}),
        ("random", {"batches": {}}),
        ("random", {"batches": None}),
        ("model", {"hidden_size": 6}),
        ("sampler", {"n": 11}),
    ],
    ids=str,
)
def test_checkpoint_that_holds_something_else_is_not_resumed(
    name: str, more: dict[str, Any], corpus: Path, out: Path
) -> None:
    files = interrupted(corpus, out)
    rewritten(files.training, lambda contents: contents.document[name].update(more))
    with pytest.raises(CheckpointError):
        resume(out)


@pytest.mark.parametrize("name", ["optimizer.more", "best.more", "model.more", "state.hidden"])
def test_checkpoint_with_another_array_is_not_resumed(name: str, corpus: Path, out: Path) -> None:
    files = interrupted(corpus, out)
    odd = {name: np.zeros((1, 2), np.float32)}
    rewritten(files.training, lambda contents: contents.arrays.update(odd))
    with pytest.raises(CheckpointError):
        resume(out)


# Killed

KILLED = """
import json, os, random, signal, sys
from pathlib import Path

import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.ticker
from gpurnn.training.config import TrainingConfig
from gpurnn.training.session import resume, start

sys.path.insert(0, {tests!r})
from test_session import RunFiles, assert_readable

config = TrainingConfig.from_json(json.loads(sys.argv[1]))
out = Path(sys.argv[2])
files = RunFiles.beside(out)

def train(on_step):
    options = {"save_every": 0}
    session = resume(out, **options) if files.training.exists() else start(config, out, **options)
    session.train(on_step)

def forked(child):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def ended(pid):
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    assert status == 0, status
    return "finished"
"""

KILLED_AT_RANDOM = (
    KILLED
    + """
rng = random.Random(int(sys.argv[3]))
steps = []
while True:
    reading, writing = os.pipe()
    waiting, going = os.pipe()

    def on_step():  # after each update: tell of it, and wait for leave to save it and go on
        os.write(writing, b".")
        os.read(waiting, 1)

    pid = forked(lambda: train(on_step))
    os.close(writing)
    updates = rng.randrange(5)
    os.write(going, b"." * updates)
    for _ in range(updates):
        if not os.read(reading, 1):
            break
    for _ in range(rng.randrange(20_000)):  # and a little more: up to about a millisecond
        pass
    os.kill(pid, signal.SIGKILL)
    how = ended(pid)
    for descriptor in (reading, waiting, going):
        os.close(descriptor)
    steps.append(assert_readable(files))
    if how == "finished":
        break
print(json.dumps(steps))
"""
)

# Each time the process is killed one file operation later: no moment between two is left out.
KILLED_EVERYWHERE = (
    KILLED
    + """
from gpurnn.training import session as session_module

expected = Path(sys.argv[3]).read_bytes()
operations, steps = 0, []

def killed_at(last):
    def hook(event, arguments):
        global operations
        if event in ("open", "os.rename", "os.chmod", "os.remove"):
            if str(arguments[0]).startswith(str(out.parent)):
                operations += 1
                if operations > last:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    train(lambda: None)

def finish():
    session_module.plot_curves = lambda *arguments, **options: None  # a picture takes its time
    train(lambda: None)

last = 0
while True:
    for path in out.parent.iterdir():
        path.unlink()
    how = ended(forked(lambda: killed_at(last)))
    steps.append(assert_readable(files))
    if how == "finished":
        break
    assert ended(forked(finish)) == "finished"
    assert assert_readable(files) >= steps[-1]
    assert out.read_bytes() == expected, last
    last += 1
print(json.dumps(steps))
"""
)


def run_script(script: str, *arguments: str) -> Any:
    script = script.replace("{tests!r}", repr(str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    seed: int, corpus: Path, out: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, epochs=10)
    steps = run_script(KILLED_AT_RANDOM, json.dumps(config.as_json()), str(out), str(seed))
    assert len(steps) > 9  # no more than four updates are saved between two kills
    assert steps == sorted(steps)  # none lost what was saved before
    assert steps[-1] == 40
    assert_same_result(RunFiles.beside(out), uninterrupted(config, tmp_path / "alone"))


@posix
@pytest.mark.slow
def test_killed_at_every_file_operation_it_ends_with_the_same_bits(
    corpus: Path, out: Path, tmp_path: Path
) -> None:
    config = tiny(corpus, epochs=2, num_steps=12)
    alone = uninterrupted(config, tmp_path / "alone")
    steps = run_script(KILLED_EVERYWHERE, json.dumps(config.as_json()), str(out), str(alone.model))
    assert len(steps) > 40
    assert steps == sorted(steps)
    assert set(steps) == {-1, 0, 1, 2, 3, 4}
    assert_same_result(RunFiles.beside(out), alone)


# From outside: the console command


def options_of(config: TrainingConfig) -> list[str]:
    """Return the command-line options that give a configuration."""
    given: list[str] = [config.corpus]
    for name, value in config.as_json().items():
        if name not in ("corpus", "momentum") and value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return given


def console(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CONSOLE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
        **options,
    )


def wait_for(training: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has saved an update."""
    while process.poll() is None:
        if training.exists():
            found = checkpoint.read(training, "training").document["progress"]["step"]
            if found >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"it ended before: {process.communicate()}")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_at_the_console(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, epochs=300)
    out = tmp_path / "a folder" / "model.safetensors"  # the command must stand the space
    out.parent.mkdir()
    command = [CONSOLE, "train", *options_of(config), "--out", str(out), "--save-every", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    wait_for(RunFiles.beside(out).training, 6, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "interrupted: everything is saved" in stderr
    step = assert_readable(RunFiles.beside(out))
    assert 6 <= step < 300 * 4
    advice = re.search(r"gpurnn train --resume .*", stderr)
    assert advice is not None
    name, *arguments = shlex.split(advice[0])
    assert name == "gpurnn"
    resumed = console(*arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after update {step} of an earlier run" in resumed.stderr
    assert_same_result(RunFiles.beside(out), uninterrupted(config, tmp_path / "alone"))


TWICE = """
import signal, sys
from gpurnn.cli import main
from gpurnn.training.session import Session

save, saves = Session.save, 0

def interrupted(self):
    global saves
    saves += 1
    if saves == 4:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    save(self)

Session.save = interrupted
sys.argv[0] = "gpurnn"
main()
"""


@posix
def test_second_interrupt_at_the_console(corpus: Path, out: Path, tmp_path: Path) -> None:
    config = tiny(corpus)
    arguments = ["train", *options_of(config), "--out", str(out), "--save-every", "0"]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "everything is saved" not in done.stderr
    assert assert_readable(RunFiles.beside(out)) == 2
    assert resume(out).train() is None
    assert_same_result(RunFiles.beside(out), uninterrupted(config, tmp_path / "alone"))


def limited(size: int) -> Callable[[], None]:
    """Return what a child does first, to live on a disk on which no file exceeds ``size``."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@posix
def test_disk_full_in_the_middle_of_a_run(corpus: Path, out: Path, tmp_path: Path) -> None:
    config = tiny(corpus)
    alone = uninterrupted(config, tmp_path / "alone")
    begun = start(config, tmp_path / "begun.safetensors")
    begun.save()
    first, last = (f.training.stat().st_size for f in (begun.files, alone))
    assert last > first + 500  # it grows by the best parameters: room for some updates, not all
    arguments = ["train", *options_of(config), "--out", str(out), "--save-every", "0"]
    done = console(*arguments, preexec_fn=limited((first + last) // 2))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    files = RunFiles.beside(out)
    assert f"could not save: {files.training}: {os.strerror(errno.EFBIG)}" in done.stderr
    assert f"gpurnn train --resume --out {out}" in done.stderr
    assert not list(out.parent.glob(".*"))
    assert 0 < assert_readable(files) < 16
    assert resume(out).train() is None
    assert_same_result(files, alone)


@posix
def test_disk_full_from_the_start(corpus: Path, out: Path) -> None:
    arguments = ["train", *options_of(tiny(corpus)), "--out", str(out)]
    done = console(*arguments, preexec_fn=limited(100))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"{RunFiles.beside(out).training}: {os.strerror(errno.EFBIG)}" in done.stderr
    assert list(out.parent.iterdir()) == []
    assert "--resume" not in done.stderr  # there is nothing to resume


@posix
def test_disk_full_from_the_start_spares_the_run_that_was_to_be_replaced(
    corpus: Path, out: Path
) -> None:
    earlier = start(tiny(corpus), out)
    assert earlier.train() is None
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    arguments = ["train", *options_of(tiny(corpus, seed=2)), "--out", str(out), "--overwrite"]
    done = console(*arguments, preexec_fn=limited(100))
    assert done.returncode == 1
    assert str(earlier.files.training) in done.stderr
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


@posix
@pytest.mark.parametrize("name", ["training", "model", "history", "curves"])
def test_file_that_cannot_be_written_in_the_middle_of_a_run(
    name: str, corpus: Path, out: Path, tmp_path: Path
) -> None:
    session = start(tiny(corpus), out, save_every=0)
    path = getattr(session.files, name)

    def block() -> None:
        if session.run.trainer.progress.step == 6:
            path.unlink(missing_ok=True)
            path.mkdir()

    with pytest.raises(SaveError) as caught:
        session.train(block)
    assert caught.value.filename == str(path)
    path.rmdir()
    if name == "training":  # the last one is gone with it
        return
    assert assert_readable(session.files) >= 6
    again = resume(out)
    assert again.train() is None
    assert_same_result(again.files, uninterrupted(tiny(corpus), tmp_path / "alone"))
