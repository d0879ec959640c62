"""The same recurrence elsewhere: torch.nn.RNN on the same GPU, a CuPy loop, JAX's scan.

A peer is made of arrays X (T, n, d), h_0, W_xh, W_hh, b_h and dH of one library ``xp`` (CuPy, or
NumPy in tests), and of whether it is to compute the gradient of X: only where we do, which is not
the case for token ids. Its passes leave their result on the device; ``results`` brings H and the
gradients of X (if wanted), h_0, W_xh, W_hh, b_h to the host, as float64, so that they can be
checked.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from gpurnn.cuda.engines import cupy

__all__ = ["CuPyLoop", "JAXScan", "MakePeer", "Peer", "TorchRNN", "peers_for", "torch_precision"]

Arrays = tuple[Any, ...]


class Peer(Protocol):
    """Something to compare with.

    ``on_stream``: its work lies on CuPy's default stream, so that events time it; else its passes
    wait for their result. ``both``: forward and backward, None if there is no backward pass.
    """

    @property
    def on_stream(self) -> bool:
        """Whether events on CuPy's default stream time it."""

    @property
    def both(self) -> Callable[[], object] | None:
        """Forward and backward, if it can."""

    def forward(self) -> object:
        """Run the forward pass, for inference."""

    def results(self) -> list[Any]:
        """Return H, and the gradients if there is a backward pass, on the host."""

    def setting(self) -> AbstractContextManager[object]:
        """Return a context in which the peer is to be used."""


MakePeer = Callable[[Arrays, Any, bool], Peer]  # of X, h_0, …; dH; whether dX is wanted


def peers_for(dtype: str) -> dict[str, MakePeer]:
    """Return what makes the peers that are installed, by name; float32 comes in two precisions."""
    found: dict[str, MakePeer] = {}
    if importlib.util.find_spec("torch") is not None:
        if dtype == "float32":
            found["torch_ieee"] = lambda a, dH, dX: TorchRNN(a, dH, dX, "ieee")
            found["torch_tf32"] = lambda a, dH, dX: TorchRNN(a, dH, dX, "tf32")
        else:
            found["torch"] = lambda a, dH, dX: TorchRNN(a, dH, dX, "ieee")
    found["cupy_loop"] = lambda a, dH, dX: CuPyLoop(a)
    if importlib.util.find_spec("jax") is not None and dtype == "float32":
        found["jax_scan"] = JAXScan
    return found


@contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    """Multiply float32 as "ieee" or as "tf32" in PyTorch's RNNs and matrix products.

    Since 2.9 PyTorch has ``fp32_precision`` for each operation and does not want it mixed with the
    older ``allow_tf32``; cuDNN's RNN is "tf32" unless told otherwise.
    """
    backends: Any = importlib.import_module("torch").backends
    if hasattr(backends.cudnn, "rnn") and hasattr(backends.cuda.matmul, "fp32_precision"):
        places, name = (backends.cudnn.rnn, backends.cuda.matmul), "fp32_precision"
        wanted: object = precision
    else:
        places, name = (backends.cudnn, backends.cuda.matmul), "allow_tf32"
        wanted = precision == "tf32"
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, wanted)
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)


class TorchRNN:
    """torch.nn.RNN with the same weights, on the arrays' device, on PyTorch's default stream.

    That stream and CuPy's default one are the same: CUDA's null stream.
    """

    on_stream = True

    def __init__(self, arguments: Arrays, dH: Any, wants_dX: bool, precision: str) -> None:
        torch: Any = importlib.import_module("torch")
        self.torch, self.precision = torch, precision
        X, h_0, W_xh, W_hh, b_h = (_tensor(torch, a) for a in arguments)
        d, h = W_xh.shape
        self.module = torch.nn.RNN(d, h, device=X.device, dtype=X.dtype)
        weights = (W_xh.T, W_hh.T, b_h, torch.zeros_like(b_h))
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        with torch.no_grad():
            for name, weight in zip(names, weights, strict=True):
                getattr(self.module, name).copy_(weight)
        self.X = X.detach().requires_grad_(wants_dX)
        self.h_0 = h_0[None].detach().requires_grad_()
        self.dH = _tensor(torch, dH)

    def setting(self) -> AbstractContextManager[object]:
        """Return a context with the peer's precision."""
        return torch_precision(self.precision)

    def forward(self) -> object:
        """Run the forward pass, for inference."""
        self.module.eval()
        with self.torch.no_grad():
            return self.module(self.X, self.h_0)

    def both(self) -> Any:
        """Run forward and backward; return H."""
        self.module.train()
        for tensor in (self.X, self.h_0, *self.module.parameters()):
            tensor.grad = None
        H, _ = self.module(self.X, self.h_0)
        H.backward(self.dH)
        return H

    def results(self) -> list[Any]:
        """Return H and the gradients, on the host."""
        H = self.both().detach()
        parameters = dict(self.module.named_parameters())
        found = (
            H,
            *([self.X.grad] if self.X.requires_grad else []),
            self.h_0.grad[0],
            parameters["weight_ih_l0"].grad.T,
            parameters["weight_hh_l0"].grad.T,
            parameters["bias_ih_l0"].grad,
        )
        return [tensor.double().cpu().numpy() for tensor in found]


class CuPyLoop:
    """A loop over the steps: matmul, add, tanh; forward only."""

    on_stream = True
    both = None

    def __init__(self, arguments: Arrays) -> None:
        self.arguments = arguments
        X, _, W_xh, _, _ = arguments
        self.xp = np if isinstance(X, np.ndarray) else cupy()
        self.H = self.xp.empty((*X.shape[:2], W_xh.shape[1]), X.dtype)

    def setting(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()

    def forward(self) -> object:
        """Run the forward pass."""
        X, state, W_xh, W_hh, b_h = self.arguments
        xp = self.xp
        Z = xp.matmul(X, W_xh)
        Z += b_h
        for Z_t, H_t in zip(Z, self.H, strict=True):
            product = xp.matmul(state, W_hh)
            product += Z_t
            state = xp.tanh(product, out=H_t)
        return self.H

    def results(self) -> list[Any]:
        """Return H on the host."""
        self.forward()
        return [_on_host(self.H).astype(np.float64)]


class JAXScan:
    """jax.lax.scan over the steps, compiled, float32 with full precision."""

    on_stream = False

    def __init__(self, arguments: Arrays, dH: Any, wants_dX: bool) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the others memory
        jax: Any = importlib.import_module("jax")
        jnp: Any = importlib.import_module("jax.numpy")
        self.jax = jax
        on_gpu = not isinstance(dH, np.ndarray)
        device = jax.devices()[0]
        if on_gpu and device.platform != "gpu":
            raise RuntimeError(
                f"jax computes on {device}: expected a GPU (pip install jax[cuda13])"
            )
        self.arguments = tuple(jax.device_put(_on_host(a), device) for a in arguments)
        self.dH = jax.device_put(_on_host(dH), device)

        def states(X: Any, h_0: Any, W_xh: Any, W_hh: Any, b_h: Any) -> Any:
            def step(state: Any, Z_t: Any) -> tuple[Any, Any]:
                state = jnp.tanh(Z_t + state @ W_hh)
                return state, state

            return jax.lax.scan(step, h_0, X @ W_xh + b_h)[1]

        def gradients(arguments: Any, dH: Any) -> Any:
            if wants_dX:
                H, back = jax.vjp(states, *arguments)
            else:
                X, *rest = arguments
                H, back = jax.vjp(lambda *others: states(X, *others), *rest)
            return H, back(dH)

        self._states, self._gradients = jax.jit(states), jax.jit(gradients)

    def setting(self) -> AbstractContextManager[object]:
        """Return a context with full precision."""
        setting: AbstractContextManager[object] = self.jax.default_matmul_precision("highest")
        return setting

    def forward(self) -> object:
        """Run the forward pass and wait for it."""
        return self.jax.block_until_ready(self._states(*self.arguments))

    def both(self) -> Any:
        """Run forward and backward and wait for them."""
        return self.jax.block_until_ready(self._gradients(self.arguments, self.dH))

    def results(self) -> list[Any]:
        """Return H and the gradients, on the host."""
        H, gradients = self.both()
        return [np.asarray(a, np.float64) for a in (H, *gradients)]


def _tensor(torch: Any, a: Any) -> Any:
    """Return an array as a tensor of the same memory; DLPack takes bfloat16 as integers only."""
    if a.dtype.name != "bfloat16":
        return torch.from_dlpack(a)
    return torch.from_dlpack(a.view(np.int16)).view(torch.bfloat16)


def _on_host(a: Any) -> Any:
    return a if isinstance(a, np.ndarray) else a.get()
