"""``gpurnn train``: train, show how it goes, compare with counting, tell where everything is."""

import dataclasses
import errno
import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpurnn import loss, validate
from gpurnn.cli.device import DeviceOption, device_of
from gpurnn.cli.output import FAILED, MISTAKE, err, fail, mistakes, note, print_json, reason
from gpurnn.sampling import TokenSampler
from gpurnn.training import (
    PRESETS,
    SaveError,
    Session,
    TrainingConfig,
    TrainingDiverged,
    ngram_perplexities,
    resume,
    start,
)

__all__ = ["train"]

NGRAM_NAMES = {1: "unigram", 2: "bigram", 5: "5-gram"}
SAMPLE_LENGTH = 200
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_DEFAULT = PRESETS["default"].as_json()


def _option(name: str, text: str) -> Any:
    """Return an option that overrides the preset; its help tells the default preset's value."""
    default = _DEFAULT[name]
    shown = "none" if default is None else default
    return typer.Option(help=f"{text} [default: {shown}]".replace("[", r"\["))


def train(
    ctx: typer.Context,
    corpus: Annotated[
        str | None,
        typer.Argument(help="python-docs (default), time-machine, or the path of a UTF-8 text."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Model file; checkpoint, history and curves go beside it.")
    ] = Path("gpurnn-model.safetensors"),
    preset: Annotated[
        str | None,
        typer.Option(help=f"A whole run by name: {', '.join(PRESETS)}. Options below override it."),
    ] = None,
    resume_run: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of --out from its checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run's files.")] = False,
    hidden_size: Annotated[int | None, _option("hidden_size", "Hidden units h.")] = None,
    num_layers: Annotated[int | None, _option("num_layers", "Recurrent layers.")] = None,
    num_steps: Annotated[int | None, _option("num_steps", "Time steps T of a batch.")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Sequences n of a batch.")] = None,
    epochs: Annotated[int | None, _option("epochs", "Passes over the training text.")] = None,
    activation: Annotated[
        str | None,
        _option(
            "activation", "tanh, relu, sigmoid, softplus, identity, fast_tanh or fast_sigmoid."
        ),
    ] = None,
    embedding_size: Annotated[
        int | None,
        _option("embedding_size", "Learn an embedding of this size instead of one-hot input."),
    ] = None,
    dropout: Annotated[
        float | None, _option("dropout", "Dropout on the output layer's input.")
    ] = None,
    init: Annotated[str | None, _option("init", "Initial weights: uniform or normal.")] = None,
    dtype: Annotated[str | None, _option("dtype", "float32 or float64.")] = None,
    optimizer: Annotated[str | None, _option("optimizer", "sgd, momentum or adamw.")] = None,
    lr: Annotated[float | None, _option("lr", "Learning rate.")] = None,
    momentum: Annotated[float | None, _option("momentum", "Of the optimizer of that name.")] = None,
    weight_decay: Annotated[
        float | None, _option("weight_decay", "Of the optimizer adamw.")
    ] = None,
    schedule: Annotated[
        str | None, _option("schedule", "Learning rate over time: constant, linear or cosine.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Updates of linear warm-up; unset: 100, or a tenth of all.")
    ] = None,
    clip: Annotated[
        float | None, _option("clip", "Global norm gradients are clipped to; 0: never.")
    ] = None,
    bptt: Annotated[str | None, _option("bptt", "full, truncated or randomized.")] = None,
    tau: Annotated[int | None, _option("tau", "Truncation length in steps.")] = None,
    sampling: Annotated[
        str | None, _option("sampling", "Batches: windows, random or sequential.")
    ] = None,
    unit: Annotated[str | None, _option("unit", "Tokens: char or word.")] = None,
    edition: Annotated[
        str | None,
        _option(
            "edition",
            "Preprocessing: raw, book, book-2017 or book-2019 (its first 10,000 characters).",
        ),
    ] = None,
    min_freq: Annotated[int | None, _option("min_freq", "Rarer tokens become <unk>.")] = None,
    max_tokens: Annotated[int | None, _option("max_tokens", "Use only the first tokens.")] = None,
    train_windows: Annotated[
        int | None, _option("train_windows", "With windows: how many of the first to train on.")
    ] = None,
    valid_windows: Annotated[
        int | None, _option("valid_windows", "With windows: how many after them to validate on.")
    ] = None,
    valid_fraction: Annotated[
        float | None, _option("valid_fraction", "Part of the text, at its end, to validate on.")
    ] = None,
    patience: Annotated[
        int | None, _option("patience", "Stop after so many epochs without improvement.")
    ] = None,
    seed: Annotated[int | None, _option("seed", "Of everything random.")] = None,
    device: DeviceOption = "auto",
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a language model.

    Without arguments: characters of the Python reference text, in under three minutes on two cores.
    """
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    given = {name: ctx.params[name] for name in names if ctx.params.get(name) is not None}
    if given.get("clip") == 0:
        given["clip"] = None
    with mistakes():
        validate.number("save-every", save_every, "0 or more seconds", lambda x: 0 <= x < math.inf)
        if resume_run:
            if overwrite:
                raise ValueError("--resume goes on with a run, --overwrite replaces it: not both")
            where = device_of(device, tell=True)
            session = resume(out, epochs=epochs, save_every=save_every, device=where)
            _refuse_changes(session.run.config, preset, given)
        else:
            config = _config(preset, given)
            where = device_of(device, tell=True)
            session = start(config, out, overwrite=overwrite, save_every=save_every, device=where)
    _announce(session)
    signal = _run(session)
    if signal is not None:
        note(f"interrupted: everything is saved; go on with: {_resume_command(session)}")
        raise typer.Exit(128 + signal)
    trainer = session.run.trainer
    if trainer.progress.epoch < trainer.config.epochs:
        note(f"stopped early: no better validation in {trainer.config.patience} epochs")
    result = _result(session)
    if as_json:
        print_json(result)
    else:
        _print_result(result)


def _config(preset: str | None, given: dict[str, Any]) -> TrainingConfig:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}: expected one of {', '.join(PRESETS)}")
    base = PRESETS[preset or "default"]
    if given.get("sampling", base.sampling) != "windows":  # what the preset says of windows
        base = dataclasses.replace(base, train_windows=None, valid_windows=None)
    try:
        config = dataclasses.replace(base, **given)
    except TypeError as e:  # such as a dtype that there is, but not here
        raise ValueError(str(e)) from e
    if "valid_fraction" in given and config.valid_windows:
        raise ValueError("valid-fraction has no effect beside valid-windows: give one of them")
    return config


def _refuse_changes(config: TrainingConfig, preset: str | None, given: dict[str, Any]) -> None:
    wanted = given if preset is None else _config(preset, given).as_json()
    changed = [
        f"{name} {value} (the run has {getattr(config, name)})"
        for name, value in wanted.items()
        if name != "epochs" and value != getattr(config, name)
    ]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, only epochs may change: {'; '.join(changed)}"
        )


def _announce(session: Session) -> None:
    run = session.run
    note(f"corpus {run.corpus.name}: {run.corpus.origin}, sha256 {run.corpus.sha256}")
    model, vocabulary = run.model, run.model.vocabulary
    note(
        f"{len(run.train_ids):,} tokens to train on, {len(run.valid_ids):,} to validate, "
        f"{len(vocabulary)} in the vocabulary; {model.num_parameters():,} parameters"
    )
    if run.trainer.progress.step:
        note(f"resuming after update {run.trainer.progress.step} of an earlier run")


def _run(session: Session) -> int | None:
    """Train with a progress bar; return the signal that stopped it, if one did."""
    trainer = session.run.trainer
    progress, config = trainer.progress, session.run.config
    steps_before = progress.step
    log_every = max(1, config.epochs // 20)
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        total = trainer.sampler.num_batches * config.epochs
        task = bar.add_task("train", total=total, completed=steps_before, epoch="", figures="")

        def on_step() -> None:
            speed = progress.epoch_tokens / max(progress.epoch_seconds, 1e-9)
            mean = progress.losses[-1]
            bar.update(
                task,
                completed=progress.step,
                total=max(total, progress.step),
                epoch=f"{progress.epoch + 1}/{config.epochs}",
                figures=f"{speed:,.0f} tokens/s  loss {mean:.3f}  "
                f"perplexity {loss.perplexity(mean):.2f}",
            )

        def on_epoch(record: dict[str, Any]) -> None:
            last = trainer.finished and record is trainer.history[-1]
            if record["epoch"] % log_every and not last:
                return
            line = f"epoch {record['epoch']:>4}  loss {record['train_loss']:.3f}  perplexity: "
            line += f"training {loss.perplexity(record['train_loss']):.3f}"
            if "valid_loss" in record:
                line += f", validation {loss.perplexity(record['valid_loss']):.3f}"
            note(f"{line}  {record['tokens_per_second']:,.0f} tokens/s")

        try:
            return session.train(on_step, on_epoch, ahead=True)
        except TrainingDiverged as e:
            if isinstance(e.__cause__, SaveError):
                note(f"could not save: {reason(e.__cause__)}")
            fail(f"{e}; in a new run, as a resumed one keeps its settings", FAILED)
        except MemoryError as e:
            fail(f"not enough memory: {e}; lower batch-size, num-steps or hidden-size", FAILED)
        except SaveError as e:
            full = e.errno in DISK_IS_FULL
            if progress.step == steps_before:
                fail(f"cannot write the run's files: {reason(e)}", FAILED if full else MISTAKE)
            fail(
                f"could not save: {reason(e)}. The last checkpoint is whole; "
                f"once this is mended, go on with: {_resume_command(session)}",
                FAILED,
            )


def _resume_command(session: Session) -> str:
    return f"gpurnn train --resume --out {shlex.quote(str(session.files.model))}"


def _result(session: Session) -> dict[str, Any]:
    run, files = session.run, session.files
    trainer = run.trainer
    best = trainer.history[trainer.progress.best_epoch - 1]
    result: dict[str, Any] = {
        "corpus": run.corpus.about(),
        "parameters": run.model.num_parameters(),
        "epochs": trainer.progress.epoch,
        "updates": trainer.progress.step,
        "seconds": trainer.progress.seconds,
        "best_epoch": best["epoch"],
        **{name: v for name, v in best.items() if name.startswith(("train_", "valid_"))},
    }
    if len(run.valid_ids):
        result["ngram_perplexity"] = {
            NGRAM_NAMES[order]: p for order, p in ngram_perplexities(run).items()
        }
    result["sample"] = _sample(session)
    result["files"] = {
        "model": str(files.model),
        "curves": str(files.curves),
        "history": str(files.history),
        "checkpoint": str(files.training),
    }
    return result


def _sample(session: Session) -> dict[str, str]:
    """Continue the beginning of the text that the model was not trained on, with a fixed seed."""
    run = session.run
    model = run.model
    length = min(20, run.config.num_steps)
    ids = (run.valid_ids if len(run.valid_ids) else run.train_ids)[:length]
    prefix = model.tokenizer.join(model.vocabulary.decode(ids))
    sampler = TokenSampler(0.8, never=model.vocabulary.reserved_ids, seed=run.config.seed)
    text = model.continued(prefix, model.generated([ids], SAMPLE_LENGTH, sampler)[0])
    return {"prefix": prefix, "text": text}


def _print_result(result: dict[str, Any]) -> None:
    def row(name: str, nats: float) -> str:
        bits = loss.bits_per_token(nats)
        return f"  {name:<20} {loss.perplexity(nats):>10.3f} {bits:>12.3f}"

    lines = [f"{'validation':<22} {'perplexity':>10} {'bits/token':>12}"]
    if "valid_loss" in result:
        lines += [
            row(f"{name}, counted", math.log(p)) for name, p in result["ngram_perplexity"].items()
        ]
        lines.append(row("this network", result["valid_loss"]))
    else:
        lines = [f"{'training':<22} {'perplexity':>10} {'bits/token':>12}"]
        lines.append(row("this network", result["train_loss"]))
    text = result["corpus"]
    lines += ["", f"text: {text['origin']}, sha256 {text['sha256']}"]
    lines += ["", "sample (temperature 0.8), after the prefix " + repr(result["sample"]["prefix"])]
    lines += ["", result["sample"]["text"], ""]
    lines += [f"{name:<12} {path}" for name, path in result["files"].items()]
    typer.echo("\n".join(lines))
