"""Every law of the contract, for channels last and channels first."""

import torch

from condmod import Site
from condmod.testing import ModulatorCase, conformance


def naive_gate(state, x, condition):
    """The formula, written as plainly as possible; the laws call it in float64."""
    gate = torch.sigmoid(condition @ state["proj.weight"].T + state["proj.bias"])
    if gate.ndim < x.ndim:  # one condition per sample, for every position
        gate = gate.reshape(len(x), *[1] * (x.ndim - 2), -1)
    return gate * x


def naive_gate_first(state, x, condition):
    """The same with channels at dim 1."""
    return naive_gate(state, x.movedim(1, -1), condition.movedim(1, -1)).movedim(-1, 1)


CASES = [
    ModulatorCase("acme.gate", Site(6, 4, name="here"), naive_gate),
    ModulatorCase("acme.gate(start=0.5)", Site(6, 4, name="here"), naive_gate),
    ModulatorCase("acme.gate", Site(6, 4, channel_dim=1, name="here"), naive_gate_first),
]


@conformance(CASES)
def test_laws(law, case):
    """One law for one case."""
    law(case)
