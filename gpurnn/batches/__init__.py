"""Batches: how a text, as an array of token ids, becomes minibatches of inputs and targets.

Three samplers, each of one edition of *Dive into Deep Learning*:

=============================  =====================================  =======================
sampler                        subsequences of length T               state between batches
=============================  =====================================  =======================
:class:`Windows`               every position starts one (9.3)        none
:class:`RandomPartition`       disjoint, in random order (8.3, 2022)  none
:class:`SequentialPartition`   n streams, read on (8.3, 2022)         carried
=============================  =====================================  =======================

A batch is a pair (X, Y) of integer arrays of shape (T, n), time first: ``X[t, i]`` is the token
of example i at time step t, and ``Y[t, i]``, the target, is the token that follows it in the text.

A sampler holds the text and no other state. ``sampler.epoch(rng)`` draws all the randomness of
one pass from ``rng`` at once and returns the pass as a sequence of batches, of which any can be
had without making those before it; ``epoch[k:]`` is the rest of a pass that was interrupted.
"""

from gpurnn.batches.epoch import Batch, Epoch, Ids, Sampler
from gpurnn.batches.partitions import RandomPartition, SequentialPartition
from gpurnn.batches.text import shifted, split
from gpurnn.batches.windows import Windows

__all__ = [
    "Batch",
    "Epoch",
    "Ids",
    "RandomPartition",
    "Sampler",
    "SequentialPartition",
    "Windows",
    "shifted",
    "split",
]
