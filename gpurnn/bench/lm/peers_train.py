"""Training in PyTorch, as one would write it: nn.RNN on one-hot vectors, nn.Linear, Adam.

nn.RNN takes vectors and no ids, so a one-hot matrix is made in every step, as the book does (9.5).
It has two biases where we have one; both are trained. Its windows lie on the device before the
clock starts and batches are gathered there, and losses are read every so many steps only: that is
faster than a DataLoader and reading each loss.
"""

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.bench.lm.blocks import Block
from gpurnn.bench.lm.capture import captured
from gpurnn.bench.peers import torch_precision

__all__ = ["TorchTraining", "TrainTask", "load_weights", "network_of"]


@dataclass(frozen=True)
class TrainTask:
    """What is to be trained: the stride-1 windows of ``ids`` from these weights, by our names."""

    ids: NDArray[Any]
    T: int
    n: int
    lr: float
    clip: float
    weights: Mapping[str, NDArray[Any]]
    device: str
    every: int
    """Steps whose losses are read at once."""


class TorchTraining:
    """A PyTorch program that trains; ``how`` is eager, compile or graph (the whole step)."""

    def __init__(self, task: TrainTask, how: str, precision: str) -> None:
        self.task, self.how, self.precision = task, how, precision
        self._timed: _Program | None = None

    def first_losses(self, count: int) -> list[float]:
        """Return the losses of the first updates, on the first batches in order.

        The second bias is held at zero, so that they can be compared with those of one bias.
        """
        n, torch = self.task.n, importlib.import_module("torch")
        with torch_precision(self.precision):
            program = _Program(self.task, self.how, one_bias=True)
            found = []
            for k in range(count):
                program.step(torch.arange(k * n, (k + 1) * n, device=self.task.device))
                found.append(program.read())
        return found

    def block(self, seconds: float) -> Block:
        """Train for about so long; the first steps, until the losses are read, are not timed."""
        with torch_precision(self.precision):
            if self._timed is None:
                self._timed = _Program(self.task, self.how, one_bias=False)
            program, task = self._timed, self.task
            program.chunk()
            chunks, begun = 0, time.perf_counter()
            while True:
                program.chunk()
                chunks += 1
                taken = time.perf_counter() - begun
                if taken >= seconds:
                    return Block(chunks * task.every * task.T * task.n, taken)


class _Program:
    """Network, optimizer and data on the device."""

    def __init__(self, task: TrainTask, how: str, *, one_bias: bool) -> None:
        torch: Any = importlib.import_module("torch")
        self.torch, self.task = torch, task
        self.network = network_of(task.weights, task.device)
        if one_bias:
            self.network.rnn.bias_hh_l0.requires_grad_(False)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=task.lr, capturable=how == "graph")
        ids = torch.from_numpy(np.array(task.ids, np.int64)).to(task.device)
        self.windows = ids.unfold(0, task.T + 1, 1)  # (count, T + 1), a view
        self.total = torch.zeros((), device=task.device)  # of the losses since the last reading
        self.steps = 0
        self.order: Any = None
        self.batch = 0
        self.call = torch.compile(self.network) if how == "compile" else self.network
        self.graph: Any = None
        self.chosen = torch.arange(task.n, device=task.device)
        if how == "graph":
            self._capture()

    def chunk(self) -> float:
        """Make ``every`` updates on random batches; return their mean loss: all is done then."""
        task, count = self.task, len(self.windows)
        for _ in range(task.every):
            if self.order is None or (self.batch + 1) * task.n > count:
                self.order, self.batch = self.torch.randperm(count, device=task.device), 0
            self.step(self.order[self.batch * task.n : (self.batch + 1) * task.n])
            self.batch += 1
        return self.read()

    def step(self, chosen: Any) -> None:
        """Update the weights once, by the windows (n,)."""
        if self.graph is None:
            self._update(chosen)
        else:
            self.chosen.copy_(chosen)
            self.graph.replay()
        self.steps += 1

    def read(self) -> float:
        """Return the mean of the losses since the last reading."""
        mean = float(self.total.item()) / self.steps
        self.total.zero_()
        self.steps = 0
        return mean

    def _update(self, chosen: Any) -> None:
        F = self.torch.nn.functional
        pairs = self.windows[chosen].T
        self.optimizer.zero_grad()
        O = self.call(pairs[:-1])
        loss = F.cross_entropy(O.flatten(0, 1), pairs[1:].flatten())
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, self.task.clip)
        self.optimizer.step()
        self.total += loss.detach()

    def _capture(self) -> None:
        self.graph = captured(lambda: self._update(self.chosen))
        load_weights(self.network, self.task.weights)  # as if there had been no update
        for state in self.optimizer.state.values():
            for a in state.values():
                a.zero_()
        self.total.zero_()


def network_of(weights: Mapping[str, NDArray[Any]], device: str) -> Any:
    """Return the module: nn.RNN on one-hot vectors, and nn.Linear, with these weights."""
    torch: Any = importlib.import_module("torch")
    q, h = weights["W_xh"].shape

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.RNN(q, h)
            self.linear = torch.nn.Linear(h, q)

        def forward(self, X: Any) -> Any:
            H, _ = self.rnn(torch.nn.functional.one_hot(X, q).float())
            return self.linear(H)

    network = Network().to(device)
    load_weights(network, weights)
    return network


def load_weights(network: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    """Copy our weights into a network; its second bias becomes zero."""
    torch: Any = importlib.import_module("torch")
    given = {
        "rnn.weight_ih_l0": weights["W_xh"].T,
        "rnn.weight_hh_l0": weights["W_hh"].T,
        "rnn.bias_ih_l0": weights["b_h"],
        "rnn.bias_hh_l0": np.zeros_like(weights["b_h"]),
        "linear.weight": weights["W_hq"].T,
        "linear.bias": weights["b_q"],
    }
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))
