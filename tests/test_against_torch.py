"""The NumPy reference against PyTorch on the CPU: another implementation, by other people.

Torch's float64 is the truth here. In float32 torch is the baseline of the tolerance rule: the
reference may lose no more than a small factor of what torch itself loses.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import DTYPES, Case, Draw, draw, draw_off_kink
from numpy.typing import NDArray
from tolerance import KINK_MARGIN, assert_close

from gpurnn import functional as F

torch = pytest.importorskip("torch", reason="PyTorch is what this file compares with")

Array = NDArray[Any]

NUM_SHAPES = 44


def random_shapes() -> list[Case]:
    """T 1…65, n 1…33, d 1…40, h 1…70: the corners of that box, then seeded draws from it."""
    rng = np.random.default_rng(94)
    lowest, highest = (1, 1, 1, 1), (65, 33, 40, 70)
    shapes = [lowest, highest, (65, 1, 1, 1), (1, 33, 40, 1), (1, 1, 40, 70), (65, 33, 1, 70)]
    shapes += [
        tuple(int(i) for i in rng.integers(lowest, highest, endpoint=True))
        for _ in range(NUM_SHAPES - 6)
    ]
    return [Case(f"T{T}-n{n}-d{d}-h{h}", T, n, d, h) for T, n, d, h in shapes]


SHAPES = random_shapes()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from waking a pool of threads for every tiny product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def leaf(a: Array) -> Any:
    """A copy of ``a`` as a torch tensor that collects its gradient."""
    return torch.tensor(a).requires_grad_()


def with_final_gradient(drawn: Draw) -> tuple[Array, Array]:
    """A gradient by the final state, which a next chunk would hand back; and dH with it added."""
    dh_T = np.roll(drawn.dH[0], 1, axis=0) / 2
    dH = drawn.dH.copy()
    dH[-1] += dh_T
    return dh_T, dH


def torch_rnn(drawn: Draw, activation: str, bias: bool) -> dict[str, Array]:
    """Run ``torch.nn.RNN``, whose weights are the transposes, with its bias cut in two.

    The halves of the bias add up to b_h without rounding; either half has b_h's gradient.
    """
    d, h = drawn.W_xh.shape
    dtype = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
    rnn = torch.nn.RNN(d, h, nonlinearity=activation, bias=bias, dtype=dtype[drawn.X.dtype])
    values = {"weight_ih_l0": drawn.W_xh.T, "weight_hh_l0": drawn.W_hh.T}
    if bias:
        b_ih = drawn.b_h.astype(np.float16).astype(drawn.b_h.dtype)
        b_hh = drawn.b_h - b_ih
        assert np.array_equal(b_ih + b_hh, drawn.b_h) and b_hh.any()
        values |= {"bias_ih_l0": b_ih, "bias_hh_l0": b_hh}
    with torch.no_grad():
        for name, value in values.items():
            getattr(rnn, name).copy_(torch.tensor(np.ascontiguousarray(value)))
    X, h_0 = leaf(drawn.X), leaf(drawn.h_0)
    H, h_T = rnn(X, h_0[None])
    dh_T, _ = with_final_gradient(drawn)
    torch.autograd.backward([H, h_T], [torch.tensor(drawn.dH), torch.tensor(dh_T)[None]])
    results = {
        "H": H.detach(),
        "h_T": h_T[0].detach(),
        "dX": X.grad,
        "dh_0": h_0.grad,
        "dW_xh": rnn.weight_ih_l0.grad.T,
        "dW_hh": rnn.weight_hh_l0.grad.T,
    }
    if bias:
        results |= {"db_h (b_ih)": rnn.bias_ih_l0.grad, "db_h (b_hh)": rnn.bias_hh_l0.grad}
    return {name: tensor.numpy() for name, tensor in results.items()}


TORCH_PHI: dict[str, Callable[[Any], Any]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    # torch's own softplus is the identity above 20, which is far from right in float64.
    "softplus": lambda Z: torch.logaddexp(Z, torch.zeros_like(Z)),
    "identity": lambda Z: Z,
}


def torch_loop(drawn: Draw, activation: str, bias: bool) -> dict[str, Array]:
    """The equation as a torch loop, differentiated by autograd."""
    tensors = {name: leaf(getattr(drawn, name)) for name in ("X", "h_0", "W_xh", "W_hh", "b_h")}
    X, h_t, W_xh, W_hh, b_h = tensors.values()
    states = []
    for X_t in X:
        Z_t = X_t @ W_xh + h_t @ W_hh
        h_t = TORCH_PHI[activation](Z_t + b_h if bias else Z_t)
        states.append(h_t)
    H = torch.stack(states)
    dh_T, _ = with_final_gradient(drawn)
    torch.autograd.backward([H, h_t], [torch.tensor(drawn.dH), torch.tensor(dh_T)])
    results = {"H": H.detach(), "h_T": h_t.detach()}
    results |= {f"d{name}": t.grad for name, t in tensors.items() if bias or name != "b_h"}
    return {name: tensor.numpy() for name, tensor in results.items()}


def ours(drawn: Draw, activation: str, bias: bool) -> dict[str, Array]:
    H, residuals = F.rnn_forward(*drawn.arguments(bias=bias), activation=activation)
    _, dH = with_final_gradient(drawn)
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(dH, residuals)
    results = {"H": H, "h_T": H[-1], "dX": dX, "dh_0": dh_0, "dW_xh": dW_xh, "dW_hh": dW_hh}
    if bias:
        results |= {"db_h": db_h, "db_h (b_ih)": db_h, "db_h (b_hh)": db_h}
    else:
        assert db_h is None
    return results


def assert_agree(
    case: Case,
    activation: str,
    bias: bool,
    theirs: Callable[[Draw, str, bool], dict[str, Array]],
) -> None:
    """Compare float64 with float64, and float32 with float64 by the tolerance rule."""
    runs = []
    for seed in case.seeds:
        if activation == "relu":
            margin = KINK_MARGIN[np.dtype(np.float32)]
            single = draw_off_kink(case, margin, seed, np.float32, bias=bias)
        else:
            single = draw(case, seed, np.float32)
        double = single.astype(np.float64)
        runs.append([f(x, activation, bias) for f in (theirs, ours) for x in (double, single)])
    for name in runs[0][0]:
        truth, baseline, double, single = (
            np.stack([run[i][name] for run in runs]) for i in range(4)
        )
        assert_close(f"float64 {name}", double, truth, length=case.length)
        assert_close(f"float32 {name}", single, truth, length=case.length, baseline=baseline)


@each_bias
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_rnn_is_that_of_torch(case: Case, activation: str, bias: bool) -> None:
    assert_agree(case, activation, bias, torch_rnn)


@each_bias
@pytest.mark.parametrize("activation", TORCH_PHI)
@pytest.mark.parametrize("case", SHAPES[1:12], ids=str)
def test_rnn_is_that_of_a_torch_loop(case: Case, activation: str, bias: bool) -> None:
    assert_agree(case, activation, bias, torch_loop)


@pytest.mark.parametrize("case", SHAPES[1:12], ids=str)
def test_ids_are_torchs_embedding(case: Case) -> None:
    """Ids that index W_xh are an embedding that is added to the recurrence without a product."""
    drawn = draw(case)
    W_xh, h_t = leaf(drawn.W_xh), torch.tensor(drawn.h_0)
    W_hh, b_h = torch.tensor(drawn.W_hh), torch.tensor(drawn.b_h)
    rows = torch.nn.functional.embedding(torch.tensor(drawn.ids), W_xh)
    states = []
    for row in rows:
        h_t = torch.tanh(row + h_t @ W_hh + b_h)
        states.append(h_t)
    torch.stack(states).backward(torch.tensor(drawn.dH))
    H, residuals = F.rnn_forward(*drawn.arguments(by_id=True))
    dX, _, dW_xh, _, _ = F.rnn_backward(drawn.dH, residuals)
    assert dX is None
    assert_close("H", H, torch.stack(states).detach().numpy(), length=case.length)
    assert_close("dW_xh", dW_xh, W_xh.grad.numpy(), length=case.length)

    looked_up = F.embedding(drawn.ids, drawn.W_xh)
    assert np.array_equal(looked_up, rows.detach().numpy())
    W_xh.grad = None
    torch.nn.functional.embedding(torch.tensor(drawn.ids), W_xh).backward(torch.tensor(drawn.dH))
    dE = F.embedding_backward(drawn.dH, drawn.ids, case.d)
    assert_close("dE", dE, W_xh.grad.numpy(), length=case.length)


@each_dtype
@pytest.mark.parametrize("case", SHAPES[:12], ids=str)
def test_output_layer_and_loss_are_those_of_torch(case: Case, dtype: type) -> None:
    drawn = draw(case, dtype=dtype)
    targets = drawn.ids % case.h

    def of_torch(drawn: Draw) -> dict[str, Any]:
        X, W, b = leaf(drawn.X), leaf(drawn.W_xh), leaf(drawn.b_h)
        O = X @ W + b
        O.retain_grad()
        nll = torch.nn.functional.cross_entropy(
            O.flatten(0, 1), torch.tensor(targets).flatten(), reduction="none"
        )
        loss = nll.mean()
        loss.backward()
        tensors = {"O": O.detach(), "nll": nll.detach().reshape(targets.shape), "dO": O.grad}
        tensors |= {"dX": X.grad, "dW": W.grad, "db": b.grad, "loss": loss.detach()}
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    O = F.linear(drawn.X, drawn.W_xh, drawn.b_h)
    loss, dO = F.cross_entropy(O, targets)
    dX, dW, db = F.linear_backward(dO, drawn.X, drawn.W_xh)
    results = {"O": O, "nll": F.negative_log_likelihood(O, targets), "dO": dO}
    results |= {"dX": dX, "dW": dW, "db": db, "loss": loss}
    truth, baseline = of_torch(drawn.astype(np.float64)), of_torch(drawn)
    for name, result in results.items():
        if case.h == 1 and name != "O":  # one class: nothing to lose, in any precision
            assert not np.any(result), name
        else:
            assert_close(
                name,
                result,
                truth[name],
                length=case.length,
                baseline=baseline[name] if dtype is np.float32 else None,
                dtype=dtype,
            )
