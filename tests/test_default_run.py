"""What ``gpurnn train`` does without arguments: the main job, on the corpus always there."""

import dataclasses

import pytest

from gpurnn.training import PRESETS, ngram_perplexities, prepare


@pytest.mark.slow
def test_default_run_is_far_below_the_bigram() -> None:
    """After six of its twenty epochs; the text differs from Python to Python, the bars do not."""
    run = prepare(dataclasses.replace(PRESETS["default"], epochs=6))
    assert run.corpus.name == "python-docs"
    assert run.trainer.run()
    counted = ngram_perplexities(run, orders=(1, 2))
    reached = run.trainer.history[-1]["valid_perplexity"]
    assert reached < 0.55 * counted[2]
    assert reached < 0.25 * counted[1]
