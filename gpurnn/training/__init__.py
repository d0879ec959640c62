"""Training a language model: settings, the loop, checkpoints, curves."""

from gpurnn.training.config import PRESETS, TrainingConfig
from gpurnn.training.run import Run, ngram_perplexities, prepare
from gpurnn.training.session import RunFiles, SaveError, Session, resume, start
from gpurnn.training.trainer import Trainer, TrainingDiverged
from gpurnn.training.validation import (
    InBatches,
    Losses,
    StreamValidation,
    Validation,
    WindowValidation,
)

__all__ = [
    "PRESETS",
    "InBatches",
    "Losses",
    "Run",
    "RunFiles",
    "SaveError",
    "Session",
    "StreamValidation",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "Validation",
    "WindowValidation",
    "ngram_perplexities",
    "prepare",
    "resume",
    "start",
]
