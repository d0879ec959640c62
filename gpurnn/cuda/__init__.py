"""Kernels from the host's side: which, compiled when, launched how.

``specs`` names kernels and is alone in importing them, ``machine_code`` compiles and keeps them,
``engines`` are the places they run in, ``arrays`` takes other libraries' arrays in, ``operations``
does the work of ``gpurnn.functional``.
"""

from gpurnn.cuda.engines import emulated
from gpurnn.cuda.plans import plan

__all__ = ["emulated", "plan"]
