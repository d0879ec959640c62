"""The command line: results on stdout, the rest on stderr, and every mistake named."""

import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

import gpurnn
from gpurnn import checkpoint
from gpurnn.cli import app
from gpurnn.language_model import LanguageModel
from gpurnn.training.config import PRESETS, TrainingConfig
from gpurnn.training.session import RunFiles, start

CONSOLE = Path(sysconfig.get_path("scripts"), "gpurnn")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# What continuous integration sets would colour the output, and break the lines of help texts.
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200", "OPENBLAS_NUM_THREADS": "1"}
COLOURFUL = ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in COLOURFUL}, **PLAIN}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def console(*arguments: object, **options: Any) -> Ended:
    """Run the console script in a process of its own."""
    done = subprocess.run(
        [CONSOLE, *map(str, arguments)],
        capture_output=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
        **options,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def inside(*arguments: object, **options: Any) -> Ended:
    """Run the same command within this process: faster, and warnings are errors."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env=PLAIN, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    colour = re.compile(r"\x1b\[[0-9;]*m")
    return Ended(result.exit_code, colour.sub("", result.stdout), colour.sub("", result.stderr))


@pytest.fixture(params=["inside", "console"])
def command(request: pytest.FixtureRequest) -> Any:
    """Either of the two."""
    return {"inside": inside, "console": console}[request.param]


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 200 words."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(" ".join(rng.choice(WORDS, 200)), encoding="utf-8")
    return path


SMALL = {
    "hidden_size": 8,
    "num_steps": 8,
    "batch_size": 4,
    "epochs": 2,
    "lr": 0.01,
    "warmup": 0,
}


def options_of(**settings: Any) -> list[str]:
    """Return settings as command-line options."""
    given = {**SMALL, **settings}
    return [part for k, v in given.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, with its checkpoint beside it; not to be changed."""
    out = tmp_path_factory.mktemp("model") / "model.safetensors"
    config = TrainingConfig(corpus=str(corpus), **SMALL)  # type: ignore[arg-type]
    assert start(config, out).train() is None
    return out


def refuse_constant(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def parsed(text: str) -> Any:
    """Parse JSON as strictly as it is defined."""
    return json.loads(text, parse_constant=refuse_constant)


# --device


@pytest.mark.parametrize("subcommand", ["train", "eval", "generate"])
def test_devices(
    subcommand: str,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "model.safetensors"
    arguments = {
        "train": [corpus, "--out", out, *options_of(epochs=1)],
        "eval": [model, corpus],
        "generate": [model, "--prefix", "the", "-n", 3, "--seed", 1],
    }[subcommand]
    asked: list[str] = []
    monkeypatch.setattr("gpurnn.cli.device.driver_present", lambda: False)

    def named(device: str) -> None:
        asked.append(device)
        if device != "cpu":
            raise ValueError("no GPU here")

    monkeypatch.setattr("gpurnn.cuda.devices.named", named)
    on_cpu = inside(subcommand, *arguments, "--device", "cpu")
    assert on_cpu.code == 0
    assert "device" not in on_cpu.stderr
    ended = inside(subcommand, *arguments, "--device", "cuda:1")
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr == "error: no GPU here\n"
    assert asked[-1] == "cuda:1"
    if subcommand == "train":
        arguments.append("--overwrite")
    ended = inside(subcommand, *arguments)
    assert ended.code == 0
    assert ended.stderr.startswith("device cpu: no GPU can be used (no GPU here)\n")
    assert ended.stdout == on_cpu.stdout


@pytest.mark.parametrize("driver", [False, True])
def test_a_gpu_for_which_nothing_is_installed_is_told_of(
    driver: bool, corpus: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(device: str) -> None:
        if device != "cpu":
            raise ImportError("CuPy is not installed")

    monkeypatch.setattr("gpurnn.cuda.devices.named", named)
    monkeypatch.setattr("gpurnn.cli.device.driver_present", lambda: driver)
    ended = inside("eval", model, corpus)
    assert ended.code == 0
    assert ("CuPy is not installed" in ended.stderr) is driver


@pytest.mark.parametrize("subcommand", ["train", "eval", "generate"])
def test_a_device_of_another_name_is_refused(
    subcommand: str, corpus: Path, model: Path, tmp_path: Path
) -> None:
    arguments = {
        "train": [corpus, "--out", tmp_path / "model.safetensors"],
        "eval": [model, corpus],
        "generate": [model, "--prefix", "the"],
    }[subcommand]
    ended = inside(subcommand, *arguments, "--device", "gpu")
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr == "error: device is 'gpu': expected 'cpu', 'cuda' or 'cuda:N'\n"


# train


def test_train_with_json(command: Any, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    code, stdout, stderr = command("train", corpus, *options_of(), "--out", out, "--json")
    assert code == 0, stderr
    result = parsed(stdout)  # and nothing else
    assert "Traceback" not in stderr and "Warning" not in stderr
    sha256 = result["corpus"]["sha256"]
    assert f"corpus {corpus}: the file {corpus}, sha256 {sha256}" in stderr
    assert "epoch    2  loss " in stderr

    files = RunFiles.beside(out)
    assert result["files"] == {
        "model": str(files.model),
        "curves": str(files.curves),
        "history": str(files.history),
        "checkpoint": str(files.training),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        Path(p).name for p in result["files"].values()
    )
    assert files.curves.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    history = [parsed(line) for line in files.history.read_text(encoding="utf-8").splitlines()]
    assert [record["epoch"] for record in history] == [1, 2]
    best = history[result["best_epoch"] - 1]
    assert best["valid_loss"] == min(record["valid_loss"] for record in history)
    for name in ("train", "valid"):
        for measure in ("loss", "perplexity"):
            assert result[f"{name}_{measure}"] == best[f"{name}_{measure}"]
    assert result["train_perplexity_book"] == best["train_perplexity_book"]
    assert "valid_perplexity_book" not in result  # a stream has no batches
    assert result["valid_perplexity"] == pytest.approx(math.exp(result["valid_loss"]))
    assert result["epochs"] == 2
    assert result["updates"] == history[-1]["step"]
    assert result["seconds"] == history[-1]["seconds"]
    assert list(result["ngram_perplexity"]) == ["unigram", "bigram", "5-gram"]
    assert all(p > 1 for p in result["ngram_perplexity"].values())

    lm = LanguageModel.load(out)
    assert result["parameters"] == lm.num_parameters()
    assert lm.about["sha256"] == sha256 == checkpoint_of(files)["corpus"]["sha256"]
    sample = result["sample"]
    assert sample["text"].startswith(sample["prefix"])
    assert len(sample["text"]) == len(sample["prefix"]) + 200
    text = corpus.read_text(encoding="utf-8")
    assert sample["prefix"] == text[round(0.9 * len(text)) :][:8]  # what it was not trained on


def checkpoint_of(files: RunFiles) -> dict[str, Any]:
    return checkpoint.read(files.training, "training").document


def test_train_in_words(command: Any, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    code, stdout, stderr = command("train", corpus, *options_of(), "--out", out)
    assert code == 0, stderr
    last = parsed(RunFiles.beside(out).history.read_text(encoding="utf-8").splitlines()[-1])
    row = re.search(r"^ +this network +(\S+) +(\S+)$", stdout, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(last["valid_perplexity"], abs=5e-4)
    assert float(row[2]) == pytest.approx(last["valid_loss"] / math.log(2), abs=5e-4)
    for counted in ("unigram, counted", "bigram, counted", "5-gram, counted", "validation"):
        assert counted in stdout
    for path in dataclasses.astuple(RunFiles.beside(out)):
        assert str(path) in stdout
    assert "\r" not in stdout and "\x1b" not in stdout


def test_train_without_validation(corpus: Path, tmp_path: Path) -> None:
    arguments = ("train", corpus, *options_of(valid_fraction=0), "--overwrite")
    out = tmp_path / "model.safetensors"
    code, stdout, stderr = inside(*arguments, "--out", out, "--json")
    assert code == 0, stderr
    result = parsed(stdout)
    assert result["best_epoch"] == 2
    assert not any(name.startswith(("valid", "ngram")) for name in result)
    code, stdout, stderr = inside(*arguments, "--out", out)
    assert code == 0, stderr
    assert stdout.startswith("training ")
    assert "counted" not in stdout


def test_same_seed_same_result(corpus: Path, tmp_path: Path) -> None:
    def result(name: str, seed: int) -> dict[str, Any]:
        out = tmp_path / f"{name}.safetensors"
        ended = inside("train", corpus, *options_of(seed=seed, dropout=0.2), "--out", out, "--json")
        assert ended.code == 0
        found = parsed(ended.stdout)
        del found["seconds"], found["files"]
        return found  # type: ignore[no-any-return]

    assert result("a", 3) == result("b", 3)
    assert result("a2", 3)["train_loss"] != result("c", 4)["train_loss"]


def test_first_moments_are_announced(corpus: Path, tmp_path: Path) -> None:
    ended = inside("train", corpus, *options_of(), "--out", tmp_path / "m.safetensors")
    size = len(corpus.read_text(encoding="utf-8"))
    held_out = size - round(0.9 * size)
    assert f"{size - held_out:,} tokens to train on, {held_out:,} to validate" in ended.stderr
    assert re.search(r"\d+ in the vocabulary; [\d,]+ parameters", ended.stderr)


def test_a_corpus_with_markup_in_its_name(tmp_path: Path, corpus: Path) -> None:
    odd = tmp_path / "[bold]odd[red] é.txt"
    odd.write_bytes(corpus.read_bytes())
    ended = inside(
        "train", odd, *options_of(epochs=1), "--out", tmp_path / "m.safetensors", "--json"
    )
    assert ended.code == 0
    assert f"corpus {odd}: the file {odd}" in ended.stderr
    assert parsed(ended.stdout)["corpus"]["name"] == str(odd)


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "words"])
def test_perplexity_beyond_all_numbers(as_json: bool, corpus: Path, tmp_path: Path) -> None:
    """A loss of 1,000 nats is finite, and exp of it is not."""
    wild = options_of(optimizer="sgd", lr=1e4, clip=0, schedule="constant", epochs=1)
    out = tmp_path / "m.safetensors"
    ended = inside("train", corpus, *wild, "--out", out, *(["--json"] if as_json else []))
    assert ended.code == 0
    loss = checkpoint_of(RunFiles.beside(out))["progress"]["best_loss"]
    assert loss > 710  # e^710 is beyond float64
    if as_json:
        assert parsed(ended.stdout)["valid_loss"] == loss
    else:
        assert f"{loss / math.log(2):.3f}" in ended.stdout


# Every option of train reaches the run

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {  # a value, and settings that it needs
    "corpus": ("time-machine", {}),
    "edition": ("book", {}),
    "unit": ("word", {}),
    "min_freq": (3, {}),
    "max_tokens": (123, {}),
    "sampling": ("random", {}),
    "num_steps": (17, {}),
    "batch_size": (19, {}),
    "train_windows": (11, {"sampling": "windows", "valid_windows": 3}),
    "valid_windows": (13, {"sampling": "windows", "train_windows": 3}),
    "valid_fraction": (0.25, {}),
    "hidden_size": (33, {}),
    "num_layers": (2, {}),
    "activation": ("relu", {}),
    "embedding_size": (9, {}),
    "dropout": (0.3, {}),
    "dtype": ("float64", {}),
    "init": ("normal", {}),
    "epochs": (77, {}),
    "optimizer": ("momentum", {}),
    "lr": (0.123, {}),
    "momentum": (0.5, {}),
    "weight_decay": (0.01, {"optimizer": "adamw"}),
    "schedule": ("linear", {}),
    "warmup": (7, {}),
    "clip": (2.5, {}),
    "bptt": ("randomized", {"tau": 4}),
    "tau": (5, {"bptt": "truncated"}),
    "patience": (6, {}),
    "seed": (42, {}),
}


class Started(NamedTuple):
    """What train would have started."""

    config: TrainingConfig
    out: Path
    options: dict[str, Any]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """Catch what train starts, and stop there."""
    calls: list[Started] = []

    def catch(config: TrainingConfig, out: Path, **options: Any) -> None:
        calls.append(Started(config, out, options))
        raise typer.Exit(99)

    module = importlib.import_module("gpurnn.cli.train")
    monkeypatch.setattr(module, "start", catch)
    return calls


def spelled(name: str, value: Any) -> list[str]:
    return [str(value)] if name == "corpus" else [f"--{name.replace('_', '-')}", str(value)]


def test_every_setting_has_an_option() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    options = {parameter.name for parameter in COMMANDS["train"].params}
    assert fields == set(OPTIONS) <= options
    others = {"out", "preset", "resume_run", "overwrite", "save_every", "device", "as_json", "help"}
    assert options - fields <= others


@pytest.mark.parametrize("name", OPTIONS)
def test_option_reaches_the_run(name: str, started: list[Started]) -> None:
    value, needed = OPTIONS[name]
    assert value != getattr(PRESETS["default"], name)
    given = [part for k, v in {name: value, **needed}.items() for part in spelled(k, v)]
    assert inside("train", *given).code == 99
    expected = dataclasses.replace(PRESETS["default"], **{name: value, **needed})
    assert [call.config for call in started] == [expected]


def test_no_option_is_the_default_preset(started: list[Started]) -> None:
    inside("train")
    inside("train", "--preset", "default")
    (config, out, options), again = started
    assert config == again.config == TrainingConfig()
    assert out == Path("gpurnn-model.safetensors")
    assert options.pop("device").startswith(("cpu", "cuda:"))  # what is there
    assert options == {"overwrite": False, "save_every": 15.0}


def test_out_overwrite_and_save_every_reach_the_run(started: list[Started]) -> None:
    inside("train", "--out", "a/b.safetensors", "--overwrite", "--save-every", "2.5")
    assert started[0].out == Path("a/b.safetensors")
    options = started[0].options
    assert (options["overwrite"], options["save_every"]) == (True, 2.5)


def test_clip_0_never_clips(started: list[Started]) -> None:
    inside("train", "--clip", "0")
    assert started[0].config == dataclasses.replace(TrainingConfig(), clip=None)


@pytest.mark.parametrize("preset", PRESETS)
def test_options_override_a_preset(preset: str, started: list[Started]) -> None:
    inside("train", "text.txt", "--preset", preset, "--seed", "9", "--epochs", "3")
    expected = dataclasses.replace(PRESETS[preset], corpus="text.txt", seed=9, epochs=3)
    assert started[0].config == expected


@pytest.mark.parametrize("sampling", ["random", "sequential"])
def test_another_sampling_takes_a_preset_without_its_windows(
    sampling: str, started: list[Started]
) -> None:
    inside("train", "--preset", "book", "--sampling", sampling)
    book = dataclasses.replace(PRESETS["book"], train_windows=None, valid_windows=None)  # first
    assert started[0].config == dataclasses.replace(book, sampling=sampling)


def test_preset_book_on_a_text_of_ones_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = tmp_path / "own.txt"
    text.write_text(" ".join(rng.choice(WORDS, 4_000)).title(), encoding="utf-8")
    out = tmp_path / "m.safetensors"
    code, stdout, stderr = inside(
        "train", text, "--preset", "book", "--epochs", 1, "--out", out, "--json"
    )
    assert code == 0, stderr
    result = parsed(stdout)
    assert result["updates"] == 10
    assert result["corpus"]["name"] == str(text)
    assert LanguageModel.load(out).vocabulary.tokens[-1].islower()
    assert "10,031 tokens to train on, 5,031 to validate" in stderr


# resume


def test_resume_for_more_epochs(command: Any, corpus: Path, tmp_path: Path) -> None:
    def train(name: str, *arguments: object) -> dict[str, Any]:
        ended = command("train", *arguments, "--out", tmp_path / f"{name}.safetensors", "--json")
        assert ended.code == 0, ended.stderr
        assert ("resuming after update" in ended.stderr) == ("--resume" in arguments)
        result = parsed(ended.stdout)
        del result["files"], result["seconds"]
        return result  # type: ignore[no-any-return]

    options = [corpus, *options_of(schedule="constant")]
    short = train("a", *options)
    resumed = train("a", "--resume", "--epochs", 4)
    assert (short["epochs"], resumed["epochs"]) == (2, 4)
    assert resumed == train("b", *options, "--epochs", 4)
    records = (tmp_path / "a.history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [parsed(record)["epoch"] for record in records] == [1, 2, 3, 4]


def test_resume_of_a_finished_run_tells_its_result_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    first = inside("train", corpus, *options_of(), "--out", out, "--json")
    again = inside("train", "--resume", "--out", out, "--json")
    assert (first.code, again.code) == (0, 0)
    assert parsed(again.stdout) == parsed(first.stdout)


def test_resume_with_the_same_settings_repeated(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    arguments = ["train", corpus, *options_of(clip=0), "--preset", "default", "--out", out]
    assert inside(*arguments).code == 0
    assert inside(*arguments, "--resume").code == 0
    assert inside("train", "--resume", "--clip", 0, "--out", out).code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (value, _) in OPTIONS.items() if name != "epochs"],
)
def test_resume_with_another_setting_is_refused(name: str, value: Any, model: Path) -> None:
    before = RunFiles.beside(model).training.read_bytes()
    ended = inside("train", *spelled(name, value), "--resume", "--out", model)
    assert ended.code == 2
    assert ended.stdout == ""
    assert name in ended.stderr and str(value) in ended.stderr
    run = checkpoint_of(RunFiles.beside(model))["config"]
    assert f"{name} {value} (the run has {run[name]})" in ended.stderr
    assert RunFiles.beside(model).training.read_bytes() == before


def test_resume_with_a_preset_of_other_settings_is_refused(model: Path) -> None:
    ended = inside("train", "--resume", "--preset", "book", "--out", model)
    assert ended.code == 2
    assert "batch_size 1024 (the run has 4)" in ended.stderr


# eval


def test_eval(command: Any, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("the fox runs over the dog again", encoding="utf-8")
    expected = LanguageModel.load(model).evaluate(text.read_text(encoding="utf-8"))

    code, stdout, stderr = command("eval", model, text, "--json")
    assert (code, stderr) == (0, "")
    assert parsed(stdout) == {
        "model": str(model),
        "text": str(text),
        "origin": f"the file {text}",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "perplexity": expected.perplexity,
        "bits_per_token": expected.bits_per_token,
        "bits_per_character": expected.bits_per_character,
        "tokens": 30,
        "characters": 30,
        "unknown": 0,
    }
    code, stdout, stderr = command("eval", model, text)
    assert (code, stderr) == (0, "")
    assert f"perplexity          {expected.perplexity:.4f} per token" in stdout
    assert f"bits per token      {expected.bits_per_token:.4f}" in stdout
    assert f"bits per character  {expected.bits_per_character:.4f}" in stdout
    assert "tokens              30 predicted, 0 unknown" in stdout
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert f"text                the file {text}, sha256 {digest}" in stdout


def test_eval_notes_what_it_does_not_know(command: Any, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("the FOX: 12", encoding="utf-8")
    code, stdout, stderr = command("eval", model, text, "--json")
    assert code == 0
    assert parsed(stdout)["unknown"] == 6
    assert "note: 6 of 10 tokens are outside the model's vocabulary" in stderr


def test_eval_by_the_books_measure(command: Any, model: Path, corpus: Path) -> None:
    expected = LanguageModel.load(model).book_perplexity(corpus.read_text(encoding="utf-8"))
    code, stdout, stderr = command("eval", model, corpus, "--book", "--json")
    assert (code, stderr) == (0, "")
    assert parsed(stdout)["perplexity_book"] == expected
    assert f"{expected:.4f}" in command("eval", model, corpus, "--book").stdout


def test_eval_of_standard_input(command: Any, model: Path, corpus: Path) -> None:
    from_file = parsed(command("eval", model, corpus, "--json").stdout)
    ended = command("eval", model, "-", "--json", input=corpus.read_bytes())
    assert (ended.code, ended.stderr) == (0, "")
    found = parsed(ended.stdout)
    assert (found["text"], found["origin"]) == ("-", "standard input")
    assert {**found, "text": str(corpus), "origin": f"the file {corpus}"} == from_file


# generate


def test_generate(command: Any, model: Path) -> None:
    arguments = ("generate", model, "--prefix", "the fox", "-n", 30, "--seed", 5)
    expected = LanguageModel.load(model).generate("the fox", 30, seed=5)
    assert command(*arguments) == Ended(0, expected + "\n", "")
    code, stdout, stderr = command(*arguments, "--json")
    assert (code, stderr) == (0, "")
    assert parsed(stdout) == {
        "model": str(model),
        "prefix": "the fox",
        "text": expected,
        "seed": 5,
    }


def test_generate_options(model: Path) -> None:
    def text(*options: object) -> str:
        ended = inside("generate", model, "--prefix", "the", *options)
        assert ended.code == 0
        assert re.fullmatch(r"(seed \d+\n)?", ended.stderr)
        return ended.stdout

    lm = LanguageModel.load(model)
    assert text("-n", 40, "--seed", 1) == text("-n", 40, "--seed", 1)
    assert text("-n", 40, "--seed", 1) != text("-n", 40, "--seed", 2)
    assert text("-n", 40) != text("-n", 40)
    assert len(text("--seed", 1)) == len("the") + 200 + 1
    assert text("-n", 0) == "the\n"
    greedy = lm.generate("the", 20, temperature=0) + "\n"
    assert text("-n", 20, "--greedy") == text("-n", 20, "--temperature", 0) == greedy
    assert text("-n", 20, "--top-k", 1) == greedy
    for name, value in {"temperature": 0.5, "top_k": 3, "top_p": 0.7}.items():
        expected = lm.generate("the", 40, seed=1, **{name: value})  # type: ignore[arg-type]
        given = f"--{name.replace('_', '-')}"
        assert text("-n", 40, "--seed", 1, given, value) == expected + "\n"
        assert expected != lm.generate("the", 40, seed=1)


def test_text_of_an_unnamed_seed_can_be_had_again(model: Path) -> None:
    arguments = ("generate", model, "--prefix", "the", "-n", 40, "--json")
    first = inside(*arguments)
    seed = parsed(first.stdout)["seed"]
    assert first.stderr == f"seed {seed}\n"
    assert inside(*arguments, "--seed", seed).stdout == first.stdout


def test_prefix_with_unknown_characters(command: Any, model: Path) -> None:
    arguments = ("generate", model, "--prefix", "the É[b]", "-n", 5, "--seed", 1)
    code, stdout, stderr = command(*arguments)
    assert code == 0
    assert stdout.startswith("the É[b]") and len(stdout) == len("the É[b]") + 5 + 1
    assert stderr == "note: not in the vocabulary, read as <unk>: '[', ']', 'É'\n"
    assert parsed(command(*arguments, "--json").stdout)["text"] == stdout[:-1]


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", ["generate", "eval", "help"])
def test_reader_that_has_gone(name: str, as_json: bool, model: Path, corpus: Path) -> None:
    arguments: dict[str, list[object]] = {
        "generate": ["generate", model, "--prefix", "the", "-n", 50],
        "eval": ["eval", model, corpus],
        "help": ["train", "--help"],
    }
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [CONSOLE, *map(str, arguments[name]), *(["--json"] if as_json else [])],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=ENVIRONMENT,
        )
    finally:
        os.close(writing)
    assert re.fullmatch(r"(seed \d+\n)?", done.stderr)
    assert done.returncode != 0


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_reader_that_stops_after_a_character(model: Path) -> None:
    arguments = ["generate", str(model), "--prefix", "t" * 100_000, "-n", "1"]  # more than a pipe
    with subprocess.Popen(
        [CONSOLE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b"t"
        process.stdout.close()
        assert re.fullmatch(rb"seed \d+\n", process.stderr.read())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", ["generate", "eval"])
def test_result_that_finds_no_room(name: str, as_json: bool, model: Path, corpus: Path) -> None:
    arguments = {
        "generate": ["generate", model, "--prefix", "the", "-n", 5, "--seed", 1],
        "eval": ["eval", model, corpus],
    }[name]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [CONSOLE, *map(str, arguments), *(["--json"] if as_json else [])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            env=ENVIRONMENT,
        )
    assert done.returncode == 1
    assert done.stderr == f"error: could not write the result: {os.strerror(errno.ENOSPC)}\n"


# Mistakes


@pytest.fixture
def places(tmp_path: Path, corpus: Path, model: Path) -> dict[str, str]:
    """What the arguments below stand for."""

    def file(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    whole = model.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "out").mkdir()
    from safetensors.numpy import save

    return {
        "corpus": str(corpus),
        "model": str(model),
        "checkpoint": str(RunFiles.beside(model).training),
        "folder": str(tmp_path / "folder"),
        "folder.safetensors": str(tmp_path / "folder.safetensors"),
        "nowhere": str(tmp_path / "nowhere"),
        "out": str(tmp_path / "out" / "m.safetensors"),
        "empty": file("empty.txt", b""),
        "latin": file("latin.txt", "é".encode("latin-1") * 400),
        "short": file("short.txt", b"the quick brown fox"),
        "letter": file("letter.txt", b"t"),
        "dots": file("dots.txt", b"... " * 100),
        "truncated": file("truncated.safetensors", whole[:-1]),
        "beheaded": file("beheaded.safetensors", whole[:100]),
        "tampered": file("tampered.safetensors", whole[:-1] + bytes([whole[-1] ^ 1])),
        "foreign": file("foreign.safetensors", save({"W": np.zeros(3)}, {"format": "pt"})),
        "png": file("picture.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "void": file("void.safetensors", b""),
    }


TRAIN_TO = " ".join(["train", "{corpus}", *options_of(), "--out"])
TRAIN = f"{TRAIN_TO} {{out}}"
GENERATE = "generate {model} -n 5"

MISTAKES: list[tuple[str, str]] = [
    # The text
    ("train nothing.txt --out {out}", "corpus 'nothing.txt' is neither a known name nor a file"),
    ("train {folder} --out {out}", "corpus '{folder}' is a folder"),
    ("train {empty} --out {out}", "corpus '{empty}' is empty"),
    ("train {latin} --out {out}", "corpus '{latin}' is not UTF-8: byte 0xe9 at offset 0"),
    ("train {short} --out {out}", "tokens"),
    ("train {short} --out {out} --valid-fraction 0", "ids has 19 tokens, but one batch of"),
    ("train {short} --out {out} --preset book", "19 tokens"),
    ("train {letter} --out {out}", "1 tokens"),
    ("train {dots} --out {out} --unit word", "corpus '{dots}' holds no token"),
    # Names
    (TRAIN + " --optimizer adam", "optimizer is 'adam': expected one of sgd, momentum, adamw"),
    (TRAIN + " --activation gelu", "activation is 'gelu': expected one of tanh, relu"),
    (TRAIN + " --preset books", "preset is 'books': expected one of default, book, book-deep"),
    (TRAIN + " --edition third", "edition is 'third': expected one of raw, book"),
    (TRAIN + " --unit byte", "unit is 'byte': expected one of char, word"),
    (TRAIN + " --unit word --edition book-2017", "edition='book-2017'"),
    (TRAIN + " --sampling all", "sampling is 'all': expected one of windows"),
    (TRAIN + " --schedule step", "schedule is 'step': expected one of constant"),
    (TRAIN + " --init zero", "init is 'zero': expected one of uniform, normal"),
    (TRAIN + " --bptt half", "bptt is 'half': expected one of full"),
    (TRAIN + " --dtype float16", "dtype is float16: expected"),
    (TRAIN + " --dtype double-precision", "dtype is 'double-precision': expected"),
    (TRAIN + " --colour red", "--colour"),
    ("learn {corpus}", "learn"),
    # Numbers
    (TRAIN + " --hidden-size 0", "hidden_size is 0: expected at least 1"),
    (TRAIN + " --num-layers 0", "num_layers is 0: expected at least 1"),
    (TRAIN + " --num-steps -1", "num_steps is -1: expected at least 1"),
    (TRAIN + " --batch-size 0", "batch_size is 0: expected at least 1"),
    (TRAIN + " --batch-size 10000", "lower T or n"),
    (TRAIN + " --num-steps 10000", "lower T or n"),
    (TRAIN + " --epochs 0", "epochs is 0: expected at least 1"),
    (TRAIN + " --epochs three", "'--epochs'"),
    (TRAIN + " --epochs 1.5", "'--epochs'"),
    (TRAIN + " --lr fast", "'--lr'"),
    (TRAIN + " --min-freq 0", "min_freq is 0: expected at least 1"),
    (TRAIN + " --max-tokens 0", "max_tokens is 0: expected at least 1"),
    (TRAIN + " --max-tokens 20", "tokens"),
    (TRAIN + " --embedding-size 0", "embedding_size is 0: expected at least 1"),
    (TRAIN + " --patience 0", "patience is 0: expected at least 1"),
    (TRAIN + " --lr nan", "lr is nan: expected a finite number above 0"),
    (TRAIN + " --lr inf", "lr is inf: expected a finite number above 0"),
    (TRAIN + " --lr 0", "lr is 0.0: expected a finite number above 0"),
    (TRAIN + " --lr -1", "lr is -1.0: expected a finite number above 0"),
    (TRAIN + " --clip -1", "clip is -1.0: expected a finite number above 0"),
    (TRAIN + " --clip nan", "clip is nan: expected a finite number above 0"),
    (TRAIN + " --dropout 1", "dropout is 1.0: expected a number in [0, 1)"),
    (TRAIN + " --momentum 1", "momentum is 1.0: expected a number in [0, 1)"),
    (TRAIN + " --valid-fraction 1", "valid_fraction is 1.0: expected a number in [0, 1)"),
    (TRAIN + " --valid-fraction 0.999", "tokens"),
    (TRAIN + " --weight-decay -1", "weight_decay is -1.0: expected"),
    (TRAIN + " --weight-decay nan", "weight_decay is nan: expected"),
    (TRAIN + " --weight-decay 0.1 --optimizer sgd", "only adamw has it, not sgd"),
    (TRAIN + " --seed -1", "seed is -1: expected"),
    (TRAIN + " --warmup -1", "warmup is -1: expected"),
    (TRAIN + " --tau 3", "tau is 3: bptt 'full' does not truncate"),
    (TRAIN + " --bptt truncated", "tau is None: bptt 'truncated' needs"),
    (TRAIN + " --bptt randomized --tau 1", "tau is 1: bptt 'randomized' needs"),
    (TRAIN + " --save-every -1", "save-every is -1.0: expected 0 or more"),
    (TRAIN + " --save-every nan", "save-every is nan: expected 0 or more"),
    (TRAIN + " --save-every inf", "save-every is inf: expected 0 or more"),
    (TRAIN + " --preset book --valid-fraction 0.2", "valid-fraction has no effect"),
    (TRAIN + " --train-windows 5", "train_windows needs sampling 'windows'"),
    (TRAIN + " --sampling windows --train-windows 5", "given together or not at all"),
    (TRAIN + " --sampling windows --train-windows 700 --valid-windows 400", "do not exist"),
    (TRAIN + " --patience 1 --valid-fraction 0", "patience is 1: nothing is validated"),
    # Where it goes
    (TRAIN_TO + " {nowhere}/m.safetensors", "{nowhere}/m.training.safetensors: No such"),
    (TRAIN_TO + " {corpus}/m.safetensors", "{corpus}/m.training.safetensors: Not a dir"),
    ("train {corpus} --out {folder}", "out is the folder {folder}: expected a file name"),
    ("train {corpus} --out {folder.safetensors}", "out is the folder {folder.safetensors}"),
    ("train {corpus} --out {folder}/m.pt", "{folder}/m.pt: expected a name that ends in"),
    ("train {corpus} --out {model}", "{model} exists: "),
    # resume
    ("train --resume --out {out}", "m.training.safetensors does not exist"),
    ("train --resume --out {folder}", "out is the folder {folder}"),
    ("train --resume --out {model} --hidden-size 9", "hidden_size 9 (the run has 8)"),
    ("train --resume --out {model} --epochs 1", "epochs is 1: the run has completed 2 already"),
    ("train --resume --overwrite --out {model}", "--resume goes on with a run, --overwrite"),
    ("train short.txt --resume --out {model}", "corpus short.txt (the run has {corpus})"),
    ("train --resume --out {model} --preset nothing", "preset is 'nothing'"),
    # The model
    *(
        (f"{command} {{{name}}} {rest}", f"{{{name}}} {why}")
        for command, rest in (("eval", "{corpus}"), ("generate", "--prefix the"))
        for name, why in {
            "nowhere": "does not exist",
            "folder": "is a folder",
            "void": "is empty",
            "png": "is not a safetensors file",
            "beheaded": "is truncated: it ends within its header",
            "truncated": "is truncated",
            "tampered": "has been changed since it was written",
            "foreign": "is a safetensors file, but gpurnn did not write it",
            "checkpoint": "is a training file, not a model file",
        }.items()
    ),
    # What to evaluate
    ("eval {model} nothing.txt", "corpus 'nothing.txt' is neither a known name nor a file"),
    ("eval {model} {empty}", "corpus '{empty}' is empty"),
    ("eval {model} {latin}", "corpus '{latin}' is not UTF-8"),
    ("eval {model} {short} --book", "ids has 19 tokens, but one window of T=32"),
    ("eval {model} {letter}", "text has 1 tokens after preprocessing"),
    ("eval {model}", "Missing argument"),
    # What to generate
    (GENERATE + " --prefix ''", "prefix '' holds no token"),
    (GENERATE, "--prefix"),
    (GENERATE + " --prefix the --temperature -1", "temperature is -1.0: expected"),
    (GENERATE + " --prefix the --temperature nan", "temperature is nan: expected"),
    (GENERATE + " --prefix the --temperature inf", "temperature is inf: expected"),
    (GENERATE + " --prefix the --top-p 2", "top_p is 2.0: expected a number in (0, 1]"),
    (GENERATE + " --prefix the --top-p 0", "top_p is 0.0: expected a number in (0, 1]"),
    (GENERATE + " --prefix the --top-p nan", "top_p is nan: expected a number in (0, 1]"),
    (GENERATE + " --prefix the --top-k 0", "top_k is 0: expected at least 1"),
    (GENERATE + " --prefix the --top-k 1.5", "'--top-k'"),
    (GENERATE + " --prefix the -n -1", "n is -1: expected at least 0"),
    (GENERATE + " --prefix the --seed -1", "seed"),
    # bench
    ("bench --device gpu", "device is 'gpu'"),
    ("bench --device cuda", "device is 'cuda'"),
    ("bench --probe --device cpu", "device is 'cpu': expected 'cuda' or 'auto' with --probe"),
    ("bench --soak 0 --device emulator", "soak is 0: expected at least 1"),
    ("bench --grid huge --device cpu", "grid is 'huge': expected one of default, group, all"),
    ("bench --threads 0", "threads is 0: expected at least 1"),
    ("bench --seconds 0", "seconds is 0.0: expected a finite number above 0"),
    ("bench --seconds nan", "seconds is nan: expected a finite number above 0"),
]


def arguments_of(line: str, places: dict[str, str]) -> list[str]:
    """Split first, so that a place may hold a space."""
    return [
        re.sub(r"\{([\w.]+)\}", lambda m: places[m[1]], part.strip("'")) for part in line.split()
    ]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("line", "named"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistake_is_named(
    line: str,
    named: str,
    places: dict[str, str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpurnn.bench.measure_cpu", lambda **_: pytest.fail("measures"))
    monkeypatch.chdir(tmp_path)
    folders = (tmp_path, model.parent)
    before = [contents_of(folder) for folder in folders]
    code, stdout, stderr = inside(*arguments_of(line, places))
    assert code == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    for name, place in places.items():
        named = named.replace(f"{{{name}}}", place)
    assert named in stderr
    assert [contents_of(folder) for folder in folders] == before  # and nothing has been touched


@pytest.mark.parametrize(
    ("line", "named"),
    [
        MISTAKES[0],
        (TRAIN + " --lr nan", "error: lr is nan"),
        (TRAIN + " --dtype float16", "error: dtype is float16"),
        (TRAIN_TO + " {corpus}/m.safetensors", "error: cannot write the run's files: "),
        ("train --resume --out {out}", "m.training.safetensors does not exist"),
        ("eval {truncated} {corpus}", "{truncated} is truncated"),
        (GENERATE + " --prefix ''", "error: prefix '' holds no token"),
        ("learn", "learn"),
    ],
)
def test_mistake_at_the_console(
    line: str, named: str, places: dict[str, str], tmp_path: Path
) -> None:
    code, stdout, stderr = console(*arguments_of(line, places), cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert "Traceback" not in stderr
    for name, place in places.items():
        named = named.replace(f"{{{name}}}", place)
    assert named in stderr


@pytest.mark.parametrize(
    ("clip", "advice"), [(0, "clipping gradients (clip 1)"), (1, "a smaller clip")]
)
def test_divergence_gives_advice(
    command: Any, clip: int, advice: str, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.safetensors"
    lr = 1e6 if clip == 0 else 1e30
    wild = options_of(activation="relu", optimizer="sgd", lr=lr, clip=clip, num_steps=40)
    code, stdout, stderr = command("train", corpus, *wild, "--out", out)
    assert (code, stdout) == (1, "")
    assert "Traceback" not in stderr and "Warning" not in stderr
    message = " ".join(stderr[stderr.index("error: ") :].split())
    assert re.match(r"error: training diverged at update \d+ \(epoch 1\): ", message)
    assert f"a lower learning rate (lr {lr / 10:g} instead of {lr:g})" in message
    assert advice in message
    assert checkpoint_of(RunFiles.beside(out))["progress"]["epoch"] == 0  # and it is whole


# The rest


def test_version(command: Any) -> None:
    assert command("--version") == Ended(0, f"gpurnn {gpurnn.__version__}\n", "")


def test_version_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpurnn", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"gpurnn {gpurnn.__version__}\n")


def test_help_lists_the_commands() -> None:
    code, stdout, stderr = inside("--help")
    assert (code, stderr) == (0, "")
    assert set(COMMANDS) == {"train", "eval", "generate", "bench", "doctor"}
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", stdout)
    assert inside("-h").stdout == stdout
    nothing = inside()
    assert "Usage:" in nothing.stdout + nothing.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_mentions_every_option(name: str) -> None:
    code, stdout, stderr = inside(name, "--help")
    assert (code, stderr) == (0, "")
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            assert parameter.name.upper() in stdout.upper()
            continue
        assert parameter.help, f"{parameter.name} is not explained"
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", stdout), option
        explained = " ".join(parameter.help.replace("\\[", "[").split())
        assert explained[:40] in " ".join(stdout.split())
