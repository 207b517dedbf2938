"""An LSTM whose state goes in and comes out, and which torch compiles as one graph."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class State(NamedTuple):
    """What an LSTM carries from block to block: hidden and cell, each (B, H)."""

    hidden: Tensor
    cell: Tensor


class Lstm(nn.Module):
    """One layer of torch's LSTM, its parameters under torch's names; (B, n, I) to (B, n, H).

    `torch.compile` refuses `nn.LSTM`, and would unroll what it computes into a graph for each
    length. Here a compiled pass has one node for all of it.
    """

    def __init__(self, reads: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden, reads))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden))

    def reset_parameters(self) -> None:
        """Draw every parameter as torch does, uniform up to 1/√H."""
        bound = self.hidden**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The hidden state behind every block, in the dtype of x, and the state behind the last."""
        from_input, from_hidden = self.weight_ih_l0.to(x.dtype), self.weight_hh_l0.to(x.dtype)
        biases = (self.bias_ih_l0.to(x.dtype), self.bias_hh_l0.to(x.dtype))
        compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        run = _compiled if compiled else _run
        y, hidden, cell = run(x, *state, from_input, from_hidden, *biases)
        return y, State(hidden, cell)

    def extra_repr(self) -> str:
        """The widths."""
        return f"{self.weight_ih_l0.shape[1]}, {self.hidden}"


def _run(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    from_input: Tensor,
    from_hidden: Tensor,
    bias: Tensor,
    other_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own operator."""
    weights = [from_input, from_hidden, bias, other_bias]
    if x.is_cuda:  # cuDNN warns unless they lie one behind the other in one memory
        flat = torch.cat([weight.flatten() for weight in weights])
        parts = torch.split(flat, [weight.numel() for weight in weights])
        weights = [part.view_as(like) for part, like in zip(parts, weights, strict=True)]
    first = (hidden[None], cell[None])
    y, hidden, cell = torch.lstm(x, first, weights, True, 1, 0.0, False, False, True)
    return y, hidden[0], cell[0]


@torch.library.custom_op("condmod_time::lstm", mutates_args=())
def _compiled(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    from_input: Tensor,
    from_hidden: Tensor,
    bias: Tensor,
    other_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one node of a compiled graph."""
    results = _run(x, hidden, cell, from_input, from_hidden, bias, other_bias)
    y, hidden, cell = (part.clone(memory_format=torch.contiguous_format) for part in results)
    return y, hidden, cell


@_compiled.register_fake
def _shapes(x: Tensor, hidden: Tensor, cell: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(*x.shape[:2], hidden.shape[1])
    return y, torch.empty_like(hidden), torch.empty_like(cell)


@torch.library.custom_op("condmod_time::lstm_backward", mutates_args=())
def _gates_backward(
    activated: list[Tensor], cell: Tensor, from_hidden: Tensor, grads: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all gates before their activation, (B, n, 4H), and of the first state.

    Args:
        activated: the input, forget, cell and output gates, each (B, n, H).
        cell: the first cell.
        from_hidden: the recurrent weights.
        grads: those of y, the last hidden and the last cell.
    """
    i, f, g, o = activated
    cells = [cell]
    for kept, new in zip(f.unbind(1), (i * g).unbind(1), strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    out, before = torch.stack(cells[1:], 1).tanh(), torch.stack(cells[:-1], 1)
    slopes = [g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), out * o * (1 - o)]
    of_y, of_hidden, of_cell = grads
    backwards = (part.unbind(1)[::-1] for part in (of_y, o * (1 - out * out), f))
    of_gates: list[Tensor] = []
    for slope, given, through, kept in zip(
        torch.cat(slopes, -1).unbind(1)[::-1], *backwards, strict=True
    ):
        of_hidden = of_hidden + given
        of_cell = torch.addcmul(of_cell, of_hidden, through)
        of_gates.append(torch.cat([of_cell, of_cell, of_cell, of_hidden], -1) * slope)
        of_hidden, of_cell = of_gates[-1] @ from_hidden, of_cell * kept
    return torch.stack(of_gates[::-1], 1), of_hidden, of_cell


@_gates_backward.register_fake
def _gates_backward_shapes(
    activated: list[Tensor], cell: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, blocks, hidden = activated[0].shape
    of_gates = cell.new_empty(batch, blocks, 4 * hidden)
    return of_gates, cell.new_empty(cell.shape), cell.new_empty(cell.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    x, hidden, cell, from_input, from_hidden, bias, other_bias, y = ctx.saved_tensors
    before = torch.cat([hidden[:, None], y[:, :-1]], 1)
    gates = F.linear(x, from_input, bias + other_bias) + F.linear(before, from_hidden)
    i, f, g, o = gates.chunk(4, -1)
    activated = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
    of_gates, of_hidden, of_cell = _gates_backward(activated, cell, from_hidden, list(grads))
    flat = of_gates.flatten(0, 1).mT
    of_bias = flat.sum(1)
    return (
        of_gates @ from_input,
        of_hidden,
        of_cell,
        flat @ x.flatten(0, 1),
        flat @ before.flatten(0, 1),
        of_bias,
        of_bias.clone(),
    )


_compiled.register_autograd(_backward, setup_context=_keep)
