"""What modulators' and encoders' laws share: one forward, many ways to run it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

from condmod.build import configure
from condmod.config import ComponentConfig
from condmod.registry import Registry

Call = Callable[[Any], Any]


def check_round_trip(config: ComponentConfig, registry: Registry | None) -> None:
    """`configure(str(config)) == config`, and the same through JSON and YAML."""
    import yaml

    dumped = config.model_dump(mode="json")
    ways = {
        "text": str(config),
        "mapping": config.model_dump(),
        "JSON": json.loads(json.dumps(dumped)),
        "YAML": yaml.safe_load(yaml.safe_dump(dumped)),
    }
    for way, spec in ways.items():
        again = configure(spec, role=config.role, registry=registry)
        assert again == config, f"{way} gives {again!r} back, not {config!r}"
        assert hash(again) == hash(config), f"the hash differs after {way}"


def check_options(cls: type[ComponentConfig]) -> None:
    """Every integer option has both bounds, and every option says what it does."""
    schema = cls.model_json_schema()
    for name, option in schema.get("properties", {}).items():
        assert option.get("description"), f"the option {name!r} has no description"
        for part in _parts(option, schema.get("$defs", {})):
            if part.get("type") == "integer":
                low = part.get("minimum", part.get("exclusiveMinimum"))
                high = part.get("maximum", part.get("exclusiveMaximum"))
                bounded = low is not None and high is not None
                assert bounded, f"the integer option {name!r} needs both bounds"


def _parts(schema: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON schema and every schema inside it."""
    found = [schema]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += _parts(schema[key], definitions)
    for key in ("anyOf", "allOf", "prefixItems"):
        for part in schema.get(key, ()):
            found += _parts(part, definitions)
    if "$ref" in schema:
        found += _parts(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return found


def check_reset(build: Callable[[], nn.Module], seed: int) -> None:
    """`reset_parameters` brings the published start back, whatever the memory held.

    Parameters and buffers, also those that no state dict has: after any re-initialisation, and
    after `to_empty`, whose memory holds anything.
    """
    fresh = build()
    start = {name: value.clone() for name, value in memory(fresh).items()}

    def spoil(module: nn.Module) -> None:
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if value.is_floating_point():
                nn.init.normal_(value)

    fresh.apply(spoil)
    check_restored(fresh, start, seed, "re-initialisation")
    empty = build().to_empty(device=torch.get_default_device())
    fill_with_rubbish(empty)
    check_restored(empty, start, seed, "to_empty")


def memory(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, persistent or not."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fill_with_rubbish(module: nn.Module) -> None:
    """Put into every parameter and buffer what no component starts with."""
    with torch.no_grad():
        for value in memory(module).values():
            value.fill_(float("nan") if value.is_floating_point() else -7)


def check_restored(module: nn.Module, start: dict[str, Tensor], seed: int, after: str) -> None:
    """`reset_parameters` under a seed gives what the constructor gave."""
    torch.manual_seed(seed)
    module.reset_parameters()  # type: ignore[operator]
    for name, value in memory(module).items():
        assert torch.equal(value, start[name]), (
            f"reset_parameters does not restore {name} after {after}; draw each parameter once, "
            "in reset_parameters alone (condmod.functional.blank_linear makes layers undrawn), "
            "and fill buffers there too"
        )


def check_copies(module: nn.Module, call: Call) -> None:
    """Deepcopy, pickle and a strict state_dict give the same output."""
    expected = flat(call(module))
    copies = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),  # noqa: S301  our own bytes
    }
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(module.state_dict(), strict=True)
    for way, other in {**copies, "state_dict": fresh}.items():
        assert torch.equal(flat(call(other)), expected), f"{way} changes the output"


def check_functional_call(module: nn.Module, run: Callable[[Callable[..., Any]], Any]) -> None:
    """`torch.func.functional_call` with other parameters equals a module that holds them."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5).add_(0.01)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    got = run(lambda *args: functional_call(module, state, args))
    assert torch.allclose(flat(got), flat(run(other)), atol=1e-6), "functional_call differs"


def check_half_call(module: nn.Module, given: tuple[Any, ...], half: tuple[Any, ...]) -> None:
    """`functional_call` with parameters in bfloat16 gives bfloat16, close to float32."""
    state = {name: value.bfloat16() for name, value in module.named_parameters()}
    if not state:
        return
    want = flat(module(*given))
    got = flat(functional_call(module, state, half))
    assert got.dtype == torch.bfloat16, f"functional_call with bfloat16 parameters: {got.dtype}"
    limit = 0.06 * max(want.abs().max().item(), 1.0)
    close(got, want, limit, "functional_call with bfloat16 parameters")


def check_compile(module: nn.Module, call: Call, backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` gives the eager output, and the same gradients."""
    torch.compiler.reset()
    expected = flat(call(module))
    compiled = flat(call(torch.compile(module, fullgraph=True, backend=backend)))
    assert torch.allclose(compiled, expected, atol=1e-5, rtol=1e-5), "compiled output differs"
    if not expected.requires_grad:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        for out in (expected, compiled)
    ]
    for eager, traced in zip(*grads, strict=True):
        assert (eager is None) == (traced is None), "a gradient appears or vanishes when compiled"
        if eager is not None:
            assert torch.allclose(eager, traced, atol=1e-4, rtol=1e-4), "compiled gradients differ"


def count_graphs(call: Callable[..., Any], *groups: Iterable[tuple[Any, ...]]) -> list[int]:
    """How many graphs one compiled function has made after each group of arguments."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for group in groups:
        for arguments in group:
            compiled(*arguments)
        counts.append(int(counter.frame_count))
    return counts


def check_meta(build: Callable[[], nn.Module], seed: int, call: Call) -> None:
    """On the meta device: the same keys and shapes, no memory; and two ways from there.

    `to_empty` and `reset_parameters` give a fresh module; `load_state_dict(assign=True)` gives
    one that runs.
    """
    real = build()
    with torch.device("meta"):
        ghost, assigned = build(), build()
    shapes = {name: tuple(value.shape) for name, value in real.state_dict().items()}
    ghosts = {name: tuple(value.shape) for name, value in ghost.state_dict().items()}
    assert ghosts == shapes, f"on the meta device the state dict is {ghosts}, not {shapes}"
    for name, value in memory(ghost).items():
        assert value.is_meta, f"{name} has memory on the meta device"
    ghost.to_empty(device=torch.get_default_device())
    fill_with_rubbish(ghost)
    check_restored(ghost, memory(real), seed, "the meta device")
    assigned.load_state_dict(real.state_dict(), assign=True)
    left = [name for name, value in memory(assigned).items() if value.is_meta]
    assert not left, f"load_state_dict(assign=True) leaves {left} on the meta device"
    assert torch.equal(flat(call(assigned)), flat(call(real))), "loaded from meta it differs"


def flat(out: Any) -> Tensor:
    """An output as one tensor: a Signal's value, a tensor itself."""
    value: Tensor = out.value if hasattr(out, "value") else out
    return value


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Shapes are equal and values agree to a tolerance."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if got.numel():
        worst = (got.double() - want.double()).abs().max().item()
        assert worst <= tolerance, f"{what}: differs by {worst:.2e}, more than {tolerance:.0e}"
