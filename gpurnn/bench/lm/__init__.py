"""Speed of the language model, training and generating, against PyTorch programs.

``runs`` says what is measured, ``text`` on what; ``ours`` is our side, ``peers_train`` and
``peers_generate`` are the others (``capture`` makes CUDA graphs of them). ``checks`` refuses who
computes something else, ``blocks`` times in turn, ``measure`` makes the records, ``report`` what
goes with them, ``ahead`` compiles, and ``command`` is the run as a command.
"""

from gpurnn.bench.lm.measure import Peers, Setting, measure_lm, torch_peers
from gpurnn.bench.lm.runs import GenerateRun, LMRun, TrainRun, lm_runs
from gpurnn.bench.lm.text import Text, benchmark_text, synthetic

__all__ = [
    "GenerateRun",
    "LMRun",
    "Peers",
    "Setting",
    "Text",
    "TrainRun",
    "benchmark_text",
    "lm_runs",
    "measure_lm",
    "synthetic",
    "torch_peers",
]
