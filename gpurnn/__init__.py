"""Recurrent networks for CUDA machines, held to a NumPy reference.

``gpurnn.functional`` has the operations on arrays, ``RNN`` the layers, ``LanguageModel`` the
character-level language model, ``NGramModel`` and ``MLPModel`` what it is measured against.
``plan`` tells which kernel would run, ``emulated`` runs the kernels without a GPU.
"""

from gpurnn import functional
from gpurnn.activation import Activation
from gpurnn.checkpoint import CheckpointError
from gpurnn.cuda import emulated, plan
from gpurnn.evaluation import Evaluation
from gpurnn.language_model import LanguageModel
from gpurnn.mlp import MLPModel
from gpurnn.ngram import NGramModel
from gpurnn.planning import Group
from gpurnn.rnn import RNN
from gpurnn.text import Corpus, CorpusError, Tokenizer, Vocabulary, load_corpus

__all__ = [
    "RNN",
    "Activation",
    "CheckpointError",
    "Corpus",
    "CorpusError",
    "Evaluation",
    "Group",
    "LanguageModel",
    "MLPModel",
    "NGramModel",
    "Tokenizer",
    "Vocabulary",
    "__version__",
    "emulated",
    "functional",
    "load_corpus",
    "plan",
]

__version__ = "0.1.0"
