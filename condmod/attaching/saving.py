"""An attachment as a folder: safetensors of the bank, and JSON of what stands where."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from condmod import __version__
from condmod.attaching.attach import check_bare, prepare
from condmod.attaching.bank import AttachedBank
from condmod.attaching.conditioned import Conditioned
from condmod.attaching.layers import Features, infer
from condmod.attaching.patterns import named_modules, plain_name, reader
from condmod.attaching.planned import Plan, PlannedSite, Start
from condmod.attaching.planning import check_placement
from condmod.attaching.sites import Placement
from condmod.attaching.standing import Freeze
from condmod.build import configure
from condmod.config import EncoderConfig, ModulatorConfig
from condmod.errors import CheckpointError, CondmodError, FoldError, SiteError
from condmod.registry import default_registry
from condmod.serialization import load_checkpoint, load_state, save_checkpoint
from condmod.site import Site

_KIND = "attachment"
_SAMPLES = 64  # values of each tensor that the fingerprint of the weights reads


Size = Annotated[int, Field(ge=1, le=1_048_576)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _SavedSite(_Strict):
    name: str
    module: str
    pattern: str
    spec: str
    placement: Placement
    features: Size
    out_features: Size | None = None
    channel_dim: Literal[-1, 1]
    condition_dim: Size | None
    argument: str
    item: Annotated[int, Field(ge=0, le=64)]


class _Base(_Strict):
    model: str
    layout: str
    weights: str
    parameters: int


class _Saved(_Strict):
    """The document of an attachment's folder."""

    format: int
    tool: str
    kind: Literal["attachment"]
    condmod: str
    name: str
    start: Start
    condition_dim: Size | None
    encoder: str | None
    base: _Base
    components: dict[str, str]
    sites: Annotated[list[_SavedSite], Field(min_length=1)]


def save(conditioned: Conditioned, folder: str | os.PathLike[str]) -> None:
    """Write the bank and what stands where; the base is not written.

    Where parameters are sharded every process calls this, and the first one writes.

    Raises:
        CheckpointError: as `save_checkpoint`.
        OSError: it cannot be written.
    """
    if conditioned._folded is not None:
        raise FoldError(f"the attachment {conditioned.name!r} is folded; call unfold() first")
    trained = [name for name, p in conditioned.base.named_parameters() if p.requires_grad]
    if trained:
        warnings.warn(
            f"{len(trained)} parameters of the base train too ({', '.join(trained[:3])}, ...) and "
            "are no part of the adapter; save them with conditioned.base.state_dict()",
            stacklevel=3,
        )
    tensors = {name: _whole(value) for name, value in conditioned.bank.state_dict().items()}
    document = _document(conditioned)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_rank() == 0:
        save_checkpoint(folder, tensors, document)
    if several:
        torch.distributed.barrier()


def push(conditioned: Conditioned, repository: str, **options: Any) -> str:
    """Upload what `save` writes; gives the commit's address."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "uploading needs huggingface_hub: pip install huggingface_hub"
        ) from error
    hub = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(conditioned, os.path.join(folder, "adapter"))
        hub.create_repo(repository, private=options.pop("private", None), exist_ok=True)
        return str(
            hub.upload_folder(
                repo_id=repository, folder_path=os.path.join(folder, "adapter"), **options
            )
        )


def load_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    freeze: Freeze = "base",
) -> Conditioned:
    """Attach what `save_pretrained` wrote to a model of the same kind.

    Warns where the model's layout or weights are not those that the adapter was trained on.

    Args:
        model: is left untouched where anything does not fit.
        folder: what `save_pretrained` wrote.
        name: the attachment's name; by default the one it was saved under.
        freeze: as in `attach`.

    Raises:
        CheckpointError: the folder is corrupt, foreign or of another model: missing and
            unexpected sites are listed.
        SiteError: the model has an attachment of this name.
        UnknownNameError: a component that no installed plugin provides.
    """
    check_bare(model)
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        raise CheckpointError(
            f"{folder!r} is no folder; give the one that save_pretrained wrote, or what "
            "huggingface_hub.snapshot_download(...) returns"
        )
    checkpoint = load_checkpoint(folder)
    saved = _read(checkpoint.document, folder)
    plan = _plan(saved, folder, sum(parameter.numel() for parameter in model.parameters()))
    _check_sites(saved, model, folder)
    with torch.device("meta"):  # a forged size costs nothing here
        expected = AttachedBank(plan).state_dict()
    wrong = [
        f"{key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}"
        for key, value in checkpoint.tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if wrong or expected.keys() - checkpoint.tensors.keys():
        wrong += [f"missing {key}" for key in expected.keys() - checkpoint.tensors.keys()]
        raise CheckpointError(f"the tensors in {folder} do not fit: {'; '.join(sorted(wrong)[:8])}")
    with torch.random.fork_rng():  # what is drawn is overwritten
        conditioned = prepare(model, plan, saved.name if name is None else name)
    for key, value in [*conditioned.bank.named_parameters(), *conditioned.bank.named_buffers()]:
        if key in checkpoint.tensors:
            value.data = value.data.to(checkpoint.tensors[key].dtype)
    load_state(conditioned.bank, checkpoint.tensors)
    found = _fingerprint(model)
    for what, one, other in (
        ("layout (names and shapes of parameters)", saved.base.layout, found.layout),
        ("weights", saved.base.weights, found.weights),
    ):
        if one != other:
            warnings.warn(
                f"the model differs in its {what} from the {saved.base.model} that the adapter in "
                f"{folder} was trained on",
                stacklevel=2,
            )
            break
    conditioned._put(freeze)
    return conditioned


def _document(conditioned: Conditioned) -> dict[str, Any]:
    plan = conditioned.plan.to_dict()
    configs: list[Any] = [planned.config for planned in conditioned.plan]
    configs += [conditioned.plan.encoder] if conditioned.plan.encoder is not None else []
    names = sorted({name for config in configs for name in _components(config)})
    return {
        "kind": _KIND,
        "condmod": __version__,
        "name": conditioned.name,
        "start": plan["start"],
        "condition_dim": plan["condition_dim"],
        "encoder": plan["encoder"],
        "base": _fingerprint(conditioned.base).model_dump(),
        "components": {name: default_registry().entry(name).provenance for name in names},
        "sites": [
            {key: value for key, value in site.items() if key != "parameters"}
            for site in plan["sites"]
        ],
    }


def _components(config: Any) -> set[str]:
    """The names of a config's component and of those nested in it."""
    found = {config.component_name()}
    for value in (getattr(config, field) for field in type(config).model_fields):
        nested = value.values() if isinstance(value, Mapping) else value
        for item in nested if isinstance(nested, tuple) else (value, *_values(nested)):
            if hasattr(item, "component_name"):
                found |= _components(item)
    return found


def _values(nested: Any) -> list[Any]:
    return list(nested) if not isinstance(nested, str) and hasattr(nested, "__iter__") else []


def _fingerprint(model: nn.Module) -> _Base:
    """What tells a base from another: names and shapes, and a sample of every tensor's values."""
    layout, weights = hashlib.sha256(), hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        layout.update(f"{plain_name(key)} {tuple(value.shape)}\n".encode())
        flat = _whole(value).detach().flatten()
        flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
        step = max(1, flat.numel() // _SAMPLES)
        if not flat.is_meta:
            weights.update(flat[::step][:_SAMPLES].double().cpu().numpy().tobytes())
    count = sum(parameter.numel() for parameter in model.parameters())
    return _Base(
        model=type(model).__name__,
        layout=layout.hexdigest(),
        weights=weights.hexdigest(),
        parameters=count,
    )


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from every process; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else tensor


def _read(document: dict[str, Any], folder: Any) -> _Saved:
    if document.get("kind") != _KIND:
        raise CheckpointError(
            f"{folder} holds no attachment, but {document.get('kind', 'something else')!r}"
        )
    try:
        return _Saved.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"the document of {folder} is damaged: {place}: {first['msg']}"
        ) from None


def _plan(saved: _Saved, folder: Any, parameters: int) -> Plan:
    """The plan that a folder tells of; its specs name registered components only."""
    try:
        encoder = None if saved.encoder is None else configure(saved.encoder, role="encoder")
        sites = tuple(
            PlannedSite(
                site.module,
                site.pattern,
                cast(ModulatorConfig, configure(site.spec, role="modulator")),
                site.placement,
                Site(
                    site.features,
                    site.condition_dim,
                    site.channel_dim,
                    out_features=site.out_features,
                    name=site.name,
                ),
                site.argument,
                site.item,
            )
            for site in saved.sites
        )
        for site in sites:
            check_placement(site.config, site.placement, site.pattern)
        for pattern in {site.pattern for site in saved.sites}:
            if not pattern.startswith("re:"):  # an expression from a file is not run
                reader(pattern)
        if len({site.site.name for site in sites}) < len(sites):
            raise SiteError("two sites have one name")
    except LookupError as error:
        hints = ", ".join(sorted(set(saved.components.values())))
        raise type(error)(f"{error}\nthe adapter was saved with {hints}") from None
    except CondmodError as error:
        raise CheckpointError(f"the document of {folder} is damaged: {error}") from None
    return Plan(
        sites, saved.condition_dim, cast("EncoderConfig | None", encoder), saved.start, parameters
    )


def _check_sites(saved: _Saved, model: nn.Module, folder: Any) -> None:
    """Check that the model has the sites, of the same size, and its patterns find no others."""
    modules = named_modules(model)
    names = {site.name for site in saved.sites}
    problems = _told("missing", sorted(names - modules.keys()))
    unexpected: list[str] = []
    for pattern in dict.fromkeys(site.pattern for site in saved.sites):
        if not pattern.startswith("re:"):  # an expression from a file is not run
            reads = reader(pattern)
            found = {id(module): name for name, module in modules.items() if reads(name, module)}
            own = {id(modules[name]) for name in names & modules.keys()}
            unexpected += [name for i, name in found.items() if i not in own]
    problems += _told("unexpected", unexpected)
    for site in saved.sites:
        known = infer(modules[site.name], site.placement) if site.name in modules else ""
        if isinstance(known, Features) and known[:2] != (site.features, site.channel_dim):
            problems.append(f"{site.name} has {known.features} features, not {site.features}")
        elif isinstance(known, Features) and known.gives != (site.out_features or site.features):
            gives = site.out_features or site.features
            problems.append(f"{site.name} gives {known.gives} features, not {gives}")
    if problems:
        raise CheckpointError(
            f"the adapter in {folder} is for another model than this {type(model).__name__}: "
            f"{'; '.join(problems)}"
        )


def _told(what: str, names: list[str]) -> list[str]:
    """One line about sites, if there are any."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return [f"{what}: {', '.join(names[:12])}{more}"] if names else []
