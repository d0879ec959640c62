"""Public operations on arrays: check the arguments, then compute.

Layouts are time-major: X (T, n, d), H (T, n, h). Every function takes float32 or float64 arrays
(one dtype for all arguments of a call) of any memory order, returns new arrays of that dtype, and
never writes into its arguments. TypeError and ValueError name the argument, what came and what was
expected. T = 0 and n = 0 give empty results and zero gradients.

NaN and infinity are refused where they spoil a result: what comes out is looked at, and only if it
is not finite are the arguments searched, and the first that holds such a value is named. A result
that overflowed from finite arguments is returned as it is.

Where the arrays lie decides what runs: NumPy arrays go to ``gpurnn.reference``. The functions of
the layers (``rnn_forward`` to ``linear_backward``) and of the embedding also take arrays on a CUDA
GPU, of CuPy or any library that hands them out by DLPack or ``__cuda_array_interface__``, all on
one device; they run ``gpurnn.kernels`` there, on CuPy's current stream, without waiting for the
result, and return CuPy arrays. Within ``gpurnn.emulated()`` they run the same kernels on NumPy
arrays. Kernels also take float16 and bfloat16: products of such numbers are summed as float32 (on
tensor cores in the order and by the rounding of the hardware), each array of a result is rounded
once. The group kernel multiplies dZ as it is rounded. Nothing is copied between host and device,
and nothing falls back in silence.

Nobody looks for NaN in what kernels compute, which would mean to wait; where X are ids, a gradient
that is not finite reaches the rows of dW_xh of its own ids only. The same arguments give the same
bits each time, and in the recurrence a row's bits depend on no other row, though their number may
decide which kernel runs; the products before and after it, and within it those of the kernel
"gemm", are cuBLAS's, whose order of summation may depend on T and n.
An array handed over by another library must stay alive, and be used on CuPy's stream or one that
waits for it, until the GPU is done. The first call of a shape compiles and sets up; only later ones
can be captured in a CUDA graph. What a captured call computes with in between comes from CuPy's
memory pool and goes back to it: capture under an allocator that nothing else uses while the graph
lives.
"""

from gpurnn.functional.layers import (
    HiddenResiduals,
    hidden_layer,
    hidden_layer_backward,
    linear,
    linear_backward,
)
from gpurnn.functional.losses import cross_entropy, negative_log_likelihood
from gpurnn.functional.recurrence import RNNResiduals, rnn_backward, rnn_forward
from gpurnn.functional.tokens import embedding, embedding_backward

__all__ = [
    "HiddenResiduals",
    "RNNResiduals",
    "cross_entropy",
    "embedding",
    "embedding_backward",
    "hidden_layer",
    "hidden_layer_backward",
    "linear",
    "linear_backward",
    "negative_log_likelihood",
    "rnn_backward",
    "rnn_forward",
]
