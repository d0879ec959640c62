"""Generation in PyTorch: a loop with nn.RNN on one step, nn.Linear, softmax and a draw.

Nothing goes to the host before the last character has been drawn. As a CUDA graph one step is
captured, and replayed for each character.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.bench.lm.blocks import Block
from gpurnn.bench.lm.capture import captured
from gpurnn.bench.lm.ours import repeated
from gpurnn.bench.lm.peers_train import network_of
from gpurnn.bench.peers import torch_precision

__all__ = ["GenerateTask", "TorchGeneration"]

NEVER = -1e30  # a bias: its softmax is 0


@dataclass(frozen=True)
class GenerateTask:
    """What is to be continued: prefixes (P, n) by ``characters``, with these weights.

    ``never``: ids that are not drawn. ``finish`` makes of the ids (characters, n) on the host what
    our side returns too.
    """

    prefix: NDArray[Any]
    characters: int
    weights: Mapping[str, NDArray[Any]]
    never: Sequence[int]
    device: str
    finish: Callable[[NDArray[np.int64]], object]


class TorchGeneration:
    """A PyTorch program that generates; ``how`` is eager or graph."""

    def __init__(self, task: GenerateTask, how: str, precision: str) -> None:
        torch: Any = importlib.import_module("torch")
        self.torch, self.task, self.how, self.precision = torch, task, how, precision
        b_q = task.weights["b_q"].copy()
        b_q[list(task.never)] = NEVER
        self.network = network_of({**task.weights, "b_q": b_q}, task.device).eval()
        q, h = task.weights["W_xh"].shape
        n = task.prefix.shape[1]
        self.q = q
        self.prefix = torch.from_numpy(np.array(task.prefix, np.int64)).to(task.device)
        # for the graph
        self.state = torch.zeros(1, n, h, device=task.device)
        self.token = torch.zeros(n, dtype=torch.int64, device=task.device)
        self.drawn = torch.zeros(task.characters, n, dtype=torch.int64, device=task.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=task.device)
        self.O = torch.zeros(n, q, device=task.device)
        self.graph: Any = None
        if how == "graph":
            with torch_precision(precision), torch.no_grad():
                self.graph = captured(self._step)

    def logits_along(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the logits (K, n, q) before each of the ids (K, n), fed with those before it."""
        fed = self.torch.from_numpy(ids).to(self.task.device)
        with torch_precision(self.precision), self.torch.no_grad():
            state, O = self._begin()
            found = [O]
            self.state.copy_(state)
            for token in fed[:-1]:
                if self.graph is None:
                    state, O = self._next(state, token)
                else:
                    self.at.zero_()
                    self.token.copy_(token)
                    self.graph.replay()
                    O = self.O.clone()
                found.append(O)
            logits: NDArray[Any] = self.torch.stack(found).double().cpu().numpy()
        return logits

    def block(self, seconds: float) -> Block:
        """Generate for about so long."""
        with torch_precision(self.precision), self.torch.no_grad():
            return repeated(self._once, self.prefix.shape[1] * self.task.characters, seconds)

    def _once(self) -> None:
        ids = self._by_graph() if self.graph is not None else self._by_loop()
        self.task.finish(ids.cpu().numpy())

    def _by_loop(self) -> Any:
        state, O = self._begin()
        drawn = []
        for i in range(self.task.characters):
            token = self.torch.multinomial(O.softmax(-1), 1)[:, 0]
            drawn.append(token)
            if i + 1 < self.task.characters:
                state, O = self._next(state, token)
        return self.torch.stack(drawn)

    def _by_graph(self) -> Any:
        state, O = self._begin()
        self.state.copy_(state)
        self.token.copy_(self._draw(O))
        self.drawn[0] = self.token
        self.at.fill_(1)
        for _ in range(self.task.characters - 1):
            self.graph.replay()
        return self.drawn

    def _begin(self) -> tuple[Any, Any]:
        """Read the prefixes."""
        H, state = self.network.rnn(self._one_hot(self.prefix))
        return state, self.network.linear(H[-1])

    def _next(self, state: Any, token: Any) -> tuple[Any, Any]:
        H, state = self.network.rnn(self._one_hot(token)[None], state)
        return state, self.network.linear(H[0])

    def _one_hot(self, ids: Any) -> Any:
        return self.torch.nn.functional.one_hot(ids, self.q).float()

    def _draw(self, O: Any) -> Any:
        """Draw as multinomial does, which in older versions waits for a check on the host."""
        p = O.softmax(-1)
        return (p / self.torch.empty_like(p).exponential_()).argmax(-1)

    def _step(self) -> None:
        """Take a step from the static state and token, and leave the next ones there."""
        state, O = self._next(self.state, self.token)
        self.state.copy_(state)
        self.O.copy_(O)
        self.token.copy_(self._draw(O))
        self.drawn.index_copy_(0, self.at, self.token[None])
        self.at += 1
