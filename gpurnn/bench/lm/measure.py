"""One record for each run: checked, timed in turn with the peers, and the ratios to them."""

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn.bench.due import Due, LateError
from gpurnn.bench.lm import blocks
from gpurnn.bench.lm.blocks import Side, in_turn, told
from gpurnn.bench.lm.checks import GREEDY, UPDATES, check_greedy, check_losses
from gpurnn.bench.lm.ours import (
    CLIP,
    LR,
    OurGeneration,
    OurTraining,
    finished,
    first_losses,
    prepared,
    weights_of,
)
from gpurnn.bench.lm.peers_generate import GenerateTask, TorchGeneration
from gpurnn.bench.lm.peers_train import TorchTraining, TrainTask
from gpurnn.bench.lm.runs import GenerateRun, LMRun, TrainRun
from gpurnn.bench.lm.text import Text
from gpurnn.cuda.engines import cupy
from gpurnn.language_model import LanguageModel

__all__ = ["Peers", "Setting", "measure_lm", "torch_peers"]

OURS = "gpurnn"
PREFIX = 16  # characters
READ_EVERY = {"cpu": 1, "cuda": 16}  # updates whose losses PyTorch's side reads at once


class TrainingPeer(Side, Protocol):
    """Another side that trains."""

    def first_losses(self, count: int) -> list[float]:
        """Return the losses of the first updates, on the first batches in order."""


class GenerationPeer(Side, Protocol):
    """Another side that generates."""

    def logits_along(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits (K, n, q) before each of the ids (K, n), fed with those before it."""


@dataclass(frozen=True)
class Peers:
    """What makes the peers, by name, and in which precision each computes."""

    train: Mapping[str, Callable[[TrainTask], TrainingPeer]]
    generate: Mapping[str, Callable[[GenerateTask], GenerationPeer]]
    precisions: Mapping[str, str]


def torch_peers(device: str, *, compiled: bool) -> Peers:
    """Return PyTorch's programs for cpu or cuda; none if it is not installed.

    A CPU knows one precision and no CUDA graphs.
    """
    if importlib.util.find_spec("torch") is None:
        return Peers({}, {}, {})
    ways = ["eager"] + ["graph"] * (device == "cuda") + ["compile"] * compiled
    precisions = ("ieee", "tf32") if device == "cuda" else ("ieee",)
    names = {f"torch_{how}_{p}": (how, p) for how in ways for p in precisions}
    return Peers(
        {n: partial(TorchTraining, how=how, precision=p) for n, (how, p) in names.items()},
        {
            n: partial(TorchGeneration, how=how, precision=p)
            for n, (how, p) in names.items()
            if how != "compile"
        },
        {name: precision for name, (_, precision) in names.items()},
    )


@dataclass(frozen=True)
class Setting:
    """Where and for how long; ``seconds`` are those for each figure."""

    device: str
    seconds: float
    text: Text
    peers: Peers

    @property
    def pause(self) -> float:
        """Seconds before a block."""
        return blocks.PAUSE if self.device == "cpu" else 0.0


def measure_lm(
    setting: Setting, runs: Sequence[LMRun], *, limit: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one record per run: our figure, the peers' and the ratios to them.

    What fails, or computes something else, is not timed: a run or a peer then has ``failed``, the
    reason, in place of its figure.

    Args:
        setting: where, for how long, on which text and against whom.
        runs: what to measure.
        limit: seconds after which nothing new is begun, no run, block or peer; what was left out
            is told by ``left_out``, in place of a run's or a peer's figure.
    """
    due = Due(limit)
    for run in runs:
        try:
            due.check()
            if isinstance(run, TrainRun):
                record = _training(run, setting, due)
            else:
                record = _generation(run, setting, due)
        except LateError as e:
            record = {**run.about(), "left_out": str(e)}
        except Exception as e:  # one run must not lose the others' figures
            record = {**run.about(), "failed": told(e)}
        yield record
        _free(setting.device)


def _training(run: TrainRun, setting: Setting, due: Due) -> dict[str, Any]:
    ours = prepared(run, setting.text, setting.device)
    config, weights = ours.config, weights_of(ours.model)
    losses = first_losses(prepared(run, setting.text, setting.device))
    task = TrainTask(
        ids=ours.train_ids,
        T=run.T,
        n=run.n,
        lr=LR,
        clip=CLIP,
        weights=weights,
        device=setting.device,
        every=READ_EVERY[setting.device],
    )
    found: dict[str, Any] = {
        "settings": {
            "q": len(ours.model.vocabulary),
            "dtype": config.dtype,
            "optimizer": "Adam",
            "lr": LR,
            "clip": CLIP,
            "updates_in_an_epoch": (len(ours.train_ids) - run.T) // run.n,
            "torch_reads_losses_every": task.every,
        },
        "first_losses": losses,
    }

    def checked(peer: TrainingPeer, precision: str) -> dict[str, Any]:
        return check_losses(peer.first_losses(UPDATES), losses, precision)

    makers = {name: partial(make, task) for name, make in setting.peers.train.items()}
    return _compared(run, found, OurTraining(ours), makers, checked, setting, due)


def _generation(run: GenerateRun, setting: Setting, due: Due) -> dict[str, Any]:
    model, prefixes = _to_generate(run, setting)
    never = model.vocabulary.reserved_ids
    ours = OurGeneration(model, prefixes, run.ours)
    greedy = ours.greedy(min(GREEDY, run.characters))
    task = GenerateTask(
        prefix=np.stack([model.vocabulary.encode(p) for p in prefixes], axis=1),
        characters=run.characters,
        weights=weights_of(model),
        never=never,
        device=setting.device,
        finish=lambda ids: finished(model, prefixes, ids),
    )
    settings = {"q": len(model.vocabulary), "temperature": 1.0, "prefix": PREFIX}

    def checked(peer: GenerationPeer, precision: str) -> dict[str, Any]:
        return {"greedy": check_greedy(peer.logits_along(greedy), greedy, never, precision)}

    makers = {name: partial(make, task) for name, make in setting.peers.generate.items()}
    return _compared(run, {"settings": settings}, ours, makers, checked, setting, due)


def _to_generate(run: GenerateRun, setting: Setting) -> tuple[LanguageModel, list[str]]:
    """Return an untrained model, and a part of the text for each row."""
    prepared_run = prepared(TrainRun(PREFIX, run.n, run.h), setting.text, setting.device)
    model, ids = prepared_run.model, prepared_run.train_ids
    parts = [ids[PREFIX * row : PREFIX * (row + 1)] for row in range(run.n)]
    return model, ["".join(model.vocabulary.decode(part)) for part in parts]


def _compared(
    run: LMRun,
    found: dict[str, Any],
    ours: Side,
    makers: Mapping[str, Callable[[], Any]],
    checked: Callable[[Any, str], dict[str, Any]],
    setting: Setting,
    due: Due,
) -> dict[str, Any]:
    """Make and check the peers, time all sides in turn, and return the record."""
    sides: dict[str, Side] = {OURS: ours}
    peers: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            due.check()
            peer = make()
            precision = setting.peers.precisions[name]
            peers[name] = {"precision": precision, **checked(peer, precision)}
            sides[name] = peer
        except LateError as e:
            peers[name] = {"left_out": str(e)}
        except Exception as e:  # whatever another library raises: our own figures must not be lost
            peers[name] = {"failed": told(e)}
    figures, failed = in_turn(sides, OURS, setting.seconds, setting.pause, due)
    mine = figures.pop(OURS)
    for name, figure in figures.items():
        peers[name]["per_second"] = figure
    for name, why in failed.items():
        peers[name] = {"failed": why}
    return {
        **run.about(),
        **found,
        "per_second": mine,
        "peers": peers,
        "ratios": {
            name: {run.group: mine["median"] / figure["median"]} for name, figure in figures.items()
        },
    }


def _free(device: str) -> None:
    """Give memory that is free back, theirs for us and ours for them; forget what was compiled.

    torch.compile keeps a few programs for each line of code, and beyond those compiles no more.
    """
    gc.collect()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()
    if device == "cuda":
        cupy().get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
