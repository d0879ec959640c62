"""What goes with the records: what they depend on, what they come to."""

from collections.abc import Sequence
from typing import Any

from gpurnn.bench import common
from gpurnn.bench.cpu import environment
from gpurnn.bench.report import gpu_environment, ratio_summary

__all__ = ["NOTES", "lm_environment", "lm_summary"]

NOTES = {
    "figures": "items per second of wall-clock time, everything waited for; the sides take turns, "
    "in blocks whose first part is not timed. A ratio is our median over the peer's: above 1 we "
    "are the faster",
    "training": "ours is gpurnn.training.Trainer, float32: whole updates, ends of epochs included. "
    "Both: Adam, all gradients clipped to norm 1 together, the same windows of the same ids, in "
    "random order, from the same weights, no validation",
    "torch_training": "a class of nn.RNN and nn.Linear, F.cross_entropy, clip_grad_norm_ and Adam. "
    "nn.RNN takes vectors and no ids: a one-hot matrix is made in each step. Its windows lie on "
    "the device and batches are gathered there; losses are read once for the number of updates "
    "that the record says",
    "two_biases": "nn.RNN has two biases, we have one: both are trained while it is timed, and "
    "the second is held at zero while the first updates' losses are compared",
    "graph": "the whole step (training: with batch, Adam(capturable=True); generation: one "
    "character) captured with torch.cuda.graph, and replayed",
    "compile": "torch.compile of the module; it leaves nn.RNN to cuDNN",
    "generation": "ours is LanguageModel.generate, PyTorch's a loop over nn.RNN on one step, "
    "nn.Linear, softmax and a draw, under no_grad, nothing fetched before the last character; both "
    "read the prefixes first and end with the texts on the host, decoded alike",
    "draws": "the loop draws by torch.multinomial; the graph by what that does inside, without its "
    "checks",
    "unk": "we never draw <unk>; on PyTorch's side its bias is so low that it is not drawn",
    "greedy": "the logits of the other side along our greedy text: where another character is "
    "better by no more than rounding, texts part there, and part_at says where",
    "tf32": "PyTorch's products; ours are in full float32 everywhere",
}
"""What has to be known to read the figures; goes with them."""


def lm_environment(device: str, threads: int) -> dict[str, Any]:
    """Return what a figure depends on: GPU or processor, driver, versions, commit."""
    if device == "cpu":
        return {**environment(threads), "date": common.date(), "notes": NOTES}
    found = {**gpu_environment(), "notes": NOTES}
    del found["floor"]
    return found


def lm_summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, per peer, the ratios in training and in generation summed up, and what is missing."""
    counts: dict[str, dict[str, int]] = {"failed": {}, "left_out": {}}
    for record in records:
        for peer, found in record.get("peers", {}).items():
            for what, by_peer in counts.items():
                if what in found:
                    by_peer[peer] = by_peer.get(peer, 0) + 1
    return {
        "ratios": ratio_summary(records),
        "peers_failed": counts["failed"],
        "peers_left_out": counts["left_out"],
        "left_out": sum("left_out" in record for record in records),
        "failed": sum("failed" in record for record in records),
    }
