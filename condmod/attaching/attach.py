"""Attach modulators to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from condmod.attaching.conditioned import Conditioned
from condmod.attaching.layers import Features, infer
from condmod.attaching.patterns import named_modules
from condmod.attaching.planned import Plan, Start
from condmod.attaching.planning import check_model, plan
from condmod.attaching.sites import sites_of
from condmod.attaching.standing import Freeze, Standing
from condmod.build import SpecLike
from condmod.errors import SiteError


def attach(
    model: nn.Module,
    patterns: Plan | Mapping[str, Any],
    *,
    condition_dim: int | None = None,
    encoder: SpecLike | None = None,
    example: Any = None,
    start: Start = "base",
    freeze: Freeze = "base",
    name: str = "default",
) -> Conditioned:
    """Attach modulators to a model that stays as it is.

    Args:
        model: any model; it keeps its state dict, and is the result's `base`.
        patterns: a plan of `condmod.plan`, or what that takes.
        condition_dim: as in `plan`.
        encoder: as in `plan`.
        example: as in `plan`.
        start: as in `plan`.
        freeze: "base" lets only the bank train; "none" leaves the model's `requires_grad` alone;
            patterns freeze the modules and parameters that they match.
        name: tells several attachments on one model apart.

    Raises:
        SiteError: as `plan`; also a name that is taken, a model that the plan does not fit. The
            model is then untouched.
        SpecError: as `configure`.
    """
    check_bare(model)
    if not isinstance(patterns, Plan):
        patterns = plan(
            model,
            patterns,
            condition_dim=condition_dim,
            encoder=encoder,
            example=example,
            start=start,
        )
    elif any(given is not None for given in (condition_dim, encoder, example)) or (
        start not in ("base", patterns.start)
    ):
        raise SiteError(
            "a plan has its condition_dim, encoder, example and start; say them in condmod.plan"
        )
    conditioned = prepare(model, patterns, name)
    conditioned._put(freeze)
    return conditioned


def check_bare(model: Any) -> None:
    """Refuse what is no model, and what `attach` has returned.

    Raises:
        SiteError: it is one of these.
    """
    check_model(model)
    if isinstance(model, Conditioned):
        raise SiteError(
            "this model is attached to already; attach to its base and under another name: "
            "condmod.attach(conditioned.base, ..., name='second')"
        )


def prepare(model: nn.Module, plan: Plan, name: str) -> Conditioned:
    """What `attach` returns, before anything is put on the model.

    Raises:
        SiteError: the model lacks a site of the plan, or has an attachment of this name.
    """
    if not isinstance(name, str) or not name:
        raise SiteError(f"the name of an attachment is text; got {name!r}")
    modules = named_modules(model)
    if any(site.slot.attachment == name for m in modules.values() for site in sites_of(m)):
        raise SiteError(
            f"the model has an attachment {name!r}; detach it (conditioned.detach()), or give "
            "this one another name=..."
        )
    missing = [planned.site.name for planned in plan if planned.site.name not in modules]
    if missing:
        raise SiteError(f"the model lacks sites of the plan: {', '.join(missing):.400}")
    owners: dict[int, str] = {}
    for planned in plan:
        place = planned.site.name
        if (other := owners.setdefault(id(modules[place]), place)) != place:
            raise SiteError(f"{other!r} and {place!r} are one module, which has one site")
        known = infer(modules[place], planned.placement)
        said = (planned.site.features, planned.site.channel_dim)
        if isinstance(known, Features) and known[1] == said[1] and known[0] != said[0]:
            raise SiteError(
                f"the plan has {said[0]} features at {place!r}, the model {known.features}"
            )
        gives = planned.site.out_features or said[0]
        if isinstance(known, Features) and known[1] == said[1] and known.gives != gives:
            raise SiteError(
                f"the plan has {gives} features that {place!r} gives, the model {known.gives}"
            )
    if len({planned.site.name for planned in plan}) < len(plan):
        raise SiteError("the plan has two sites of one name")
    conditioned = Conditioned(model, plan, name)
    device = next((parameter.device for parameter in model.parameters()), None)
    conditioned.bank.to(device)
    return conditioned


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take attachments off a model for which there is no `conditioned.detach()` any more.

    So of a copy of the bare model, or where what `attach` returned is lost.

    Args:
        model: the bare model.
        name: of the attachment; all of them where it is left out.

    Raises:
        SiteError: it is no model, or what `attach` has returned.
    """
    check_bare(model)
    standing = Standing()
    for module in model.modules():
        for site in sites_of(module):
            if name in (None, site.slot.attachment):
                standing.sites[f"{site.slot.attachment} {site.slot.place}"] = site
    standing.lift(model)
    return model
