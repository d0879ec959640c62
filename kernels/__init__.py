"""Device code of gpurnn: Numba CUDA kernels, and nothing else.

Installed as ``gpurnn.kernels``. The modules here hold functions that run on the GPU (or in the
emulator); they import no NumPy, allocate nothing, check nothing and read no environment
variable. Everything a kernel assumes has been established by ``gpurnn.validate`` before it is
launched, and only ``gpurnn.cuda`` launches it.

``step`` is read first: one time step a launch. ``resident`` takes the whole sequence in one, with
the product of ``product``. ``group`` does so over several blocks, which ``exchange`` their states;
``part`` says what a block of it computes, ``split`` in float32, ``tensor`` by the instructions of
``mma``. ``probes`` measure what an exchange takes. ``layer`` is a step without a state, ``tiled``
the product of both it and ``step``; ``tail`` is what remains of a step whose product a library
makes. ``tokens`` fetches rows of ``W_xh`` by id for all of these, and adds up their gradient;
``columns`` adds up that of a bias.
``cross_entropy`` is softmax, loss and gradient in one pass, ``loss_mean`` the mean that follows, by
the ``sums`` of a block. ``dropout`` makes its mask anew wherever it is wanted, by ``philox``.
``update`` clips and updates all parameters, and ``batch`` takes the next batch out of a text. A
kernel is made by a factory for sizes, an activation (``activations``) and a way of storing numbers
(``storage``); its docstring is the contract.

``generate`` draws whole texts, one a block, ``generate_group`` one over several blocks: products by
``dense``, of matrices that lie on the chip or not, and tokens by ``sampling`` or, of many,
``sampling_block``.

Layouts
-------
Every array is C-contiguous. Sizes and names are the chapter's (*Dive into Deep Learning*,
section 9.4): ``T`` time steps, ``n`` rows of the batch, ``d`` inputs, ``h`` hidden units, ``q``
outputs.

==========  ==============  =====================================================================
name        shape           meaning
==========  ==============  =====================================================================
``X``       (T, n, d)       floating-point input, or (T, n) integer token ids that pick rows of
                            ``W_xh``
``h_0``     (n, h)          state before the first step
``H``       (T, n, h)       states after each step; ``H[T - 1]`` is the final state ``h_T``
``Z``       (T, n, h)       ``X W_xh``, and in the end the whole pre-activation, where φ′ wants it
``W_xh``    (d, h)          input weights
``W_hh``    (h, h)          recurrent weights, ``H_t = φ(X_t W_xh + H_{t-1} W_hh + b_h)`` (9.4.5)
``b_h``     (h,)            bias
``O``       (T·n, q)        logits, ``H W_hq`` or with ``b_q`` (q,) added (9.4.6)
``dA``      like ``A``      derivative of the loss by ``A``
``states``  (T + 1, n, h)   ``h_0`` and then ``H``, one array: what the backward pass wants
``grads``   (T + 1, n, h)   ``dh_0`` and then ``dZ``
``xi``      (T,)            factors on the gradient that flows from a step to the state before it
==========  ==============  =====================================================================

Offsets into (T, n, h) arrays are 64-bit. A kernel writes every element of its outputs and reads
none of them before it wrote them; inputs and outputs never alias unless the kernel's own
docstring says which may.
"""

if __name__ != "gpurnn.kernels":
    raise ImportError(
        f"the folder {__path__[0]!r} is the source of the package gpurnn.kernels and cannot be "
        f"imported as {__name__!r}: install the project (pip install -e .) and import "
        "gpurnn.kernels, or leave this folder if another package named 'kernels' was meant"
    )

__all__: list[str] = []
