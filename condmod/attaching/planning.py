"""Which modulator goes where in a model: `plan` says it and touches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import nn

from condmod.attaching.example import Observed
from condmod.attaching.layers import Features, Unknown, first_argument, infer
from condmod.attaching.patterns import match, named_modules
from condmod.attaching.sites import Placement
from condmod.attaching.starting import check_starts
from condmod.bank import Bank
from condmod.build import SpecLike, configure, create_encoder
from condmod.config import EncoderConfig, ModulatorConfig
from condmod.errors import SiteError, SpecError
from condmod.modulator import Modulator
from condmod.site import Site
from condmod.spec import call

Start = Literal["base", "published"]
Choice = "SpecLike | tuple[Any, ...]"


@dataclass(frozen=True)
class PlannedSite:
    """One place of a model and what goes there.

    Attributes:
        module: the class of the module, for people to read.
        pattern: what named it.
        config: the modulator's options.
        placement: on what the module reads, on what it gives, or around it.
        site: C, D, where the channels lie, and the module's dotted name.
        argument: the name of the argument that holds the features.
        item: which of several outputs holds the features.
    """

    module: str
    pattern: str
    config: ModulatorConfig
    placement: Placement
    site: Site
    argument: str
    item: int


class Counts(NamedTuple):
    """How many parameters an attachment has.

    Attributes:
        sites: at each site, by its name.
        shared: in what the sites of a pattern share, by the pattern.
        encoder: in the encoder.
    """

    sites: dict[str, int]
    shared: dict[str, int]
    encoder: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.sites.values()) + sum(self.shared.values()) + self.encoder


@dataclass(frozen=True)
class Plan:
    """Every site of an attachment; prints as a table.

    Attributes:
        sites: in the order of the patterns, and of the model.
        condition_dim: D, the width of the condition; None where every modulator has its encoder.
        encoder: turns raw signals into the condition, if there is one.
        start: whether the model starts as it was ("base") or each modulator as it was published.
        base_parameters: how many the model has.
    """

    sites: tuple[PlannedSite, ...]
    condition_dim: int | None
    encoder: EncoderConfig | None
    start: Start
    base_parameters: int

    def groups(self) -> dict[str, list[PlannedSite]]:
        """The sites by pattern: those of one pattern share what their mechanism shares."""
        groups: dict[str, list[PlannedSite]] = {}
        for site in self.sites:
            groups.setdefault(site.pattern, []).append(site)
        return groups

    def parameters(self) -> Counts:
        """How many there are at each site, in what the sites of a pattern share, in the encoder."""
        sites: dict[str, int] = {}
        shared: dict[str, int] = {}
        encoder = 0
        with torch.device("meta"):
            for pattern, planned in self.groups().items():
                bank = build_bank(planned)
                sites |= {name: _count(bank[name]) for name in bank}
                if bank.shared is not None:
                    shared[pattern] = _count(bank.shared)
            if self.encoder is not None:
                encoder = _count(create_encoder(self.encoder, self.condition_dim))
        return Counts(sites, shared, encoder)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        counts = self.parameters()
        return {
            "condition_dim": self.condition_dim,
            "encoder": None if self.encoder is None else str(self.encoder),
            "start": self.start,
            "base_parameters": self.base_parameters,
            "parameters": counts.total,
            "sites": [
                {
                    "name": planned.site.name,
                    "module": planned.module,
                    "pattern": planned.pattern,
                    "spec": str(planned.config),
                    "placement": planned.placement,
                    "features": planned.site.features,
                    "channel_dim": planned.site.channel_dim,
                    "condition_dim": planned.site.condition_dim,
                    "argument": planned.argument,
                    "item": planned.item,
                    "parameters": counts.sites[planned.site.name],
                }
                for planned in self.sites
            ],
        }

    def __str__(self) -> str:
        counts = self.parameters()
        head = ("site", "module", "spec", "placement", "features", "channels", "parameters")
        alike: dict[tuple[str, ...], list[PlannedSite]] = {}
        for planned in self.sites:
            channels = "last" if planned.site.channel_dim == -1 else "dim 1"
            what = (planned.module, str(planned.config), str(planned.placement))
            sizes = (str(planned.site.features), channels, str(counts.sites[planned.site.name]))
            shape = re.sub(r"(?<![^.])\d+(?![^.])", "*", planned.site.name)
            alike.setdefault((shape, *what, *sizes), []).append(planned)
        rows: list[tuple[str, ...]] = [
            (_ranges([p.site.name for p in sites]), *cells, _times(len(sites), int(number)))
            for (_, *cells, number), sites in alike.items()
        ]
        rows += [
            (pattern, "", "shared", "", "", "", f"{number:,}")
            for pattern, number in counts.shared.items()
        ]
        total = counts.total
        part = f" ({_part(total, self.base_parameters)})" if self.base_parameters else ""
        condition = "the modulators' own" if self.condition_dim is None else str(self.condition_dim)
        lines = [_aligned(head, rows)]
        if self.encoder is not None:
            lines.append(f"encoder {self.encoder}, {counts.encoder:,} parameters")
        lines.append(
            f"{len(self.sites)} sites, condition_dim {condition}, {total:,} parameters{part}"
        )
        return "\n".join(lines)

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def plan(
    model: nn.Module,
    patterns: Mapping[str, Any],
    *,
    condition_dim: int | None = None,
    encoder: SpecLike | None = None,
    example: Any = None,
    start: Start = "base",
) -> Plan:
    """Say what `attach` would put where; nothing is touched.

    Args:
        model: any model.
        patterns: by pattern a spec, or a tuple of a spec with a placement ("input", "output" or
            "around"; by default a modulator of features conditions a module's output, one that
            acts around sublayers the module) or with a `Site` that says the features by hand, or
            with both. A pattern is a dotted glob, * within a segment and ** across, or "re:" and
            an expression for the whole name, or "type:" and a class.
        condition_dim: D, the width of the condition.
        encoder: spec of what turns raw signals into the condition; its width is D.
        example: what the model takes, a tensor, a tuple of arguments or a mapping of keywords: it
            runs once, so that features that no class tells are seen.
        start: "base" makes the model start as it was, bit for bit; "published" keeps each
            mechanism's own start.

    Raises:
        SiteError: a pattern that matches nothing, two that overlap, features that cannot be
            inferred, a component that cannot start as the base.
        SpecError: as `configure`.
    """
    check_model(model)
    if start not in get_args(Start):
        raise SiteError(f"start is 'base' or 'published'; got {start!r}")
    if not isinstance(patterns, Mapping) or not patterns:
        raise SiteError(
            "patterns are specs by pattern, as in {'blocks.*.norm1': 'film'}; got "
            f"{type(patterns).__name__ if not isinstance(patterns, Mapping) else 'none'}"
        )
    encoding = None
    if encoder is not None:
        encoding = cast(EncoderConfig, configure(encoder, role="encoder"))
        with torch.device("meta"):
            condition_dim = create_encoder(encoding, condition_dim).out_dim
    modules = named_modules(model)
    observed = None if example is None else Observed(model, modules, example)
    sites: list[PlannedSite] = []
    owners: dict[int, tuple[str, str]] = {}
    for pattern, choice in patterns.items():
        config, placement, given = _chosen(pattern, choice)
        config = _one_part(config)
        config = config if start == "published" else starting_as_base(config)
        for name in match(pattern, modules):
            module = modules[name]
            if (held := owners.setdefault(id(module), (pattern, name))) != (pattern, name):
                if held[0] == pattern:  # one module under two names
                    continue
                raise SiteError(
                    f"the patterns {held[0]!r} and {pattern!r} both match {name!r}; a module has "
                    "one site in an attachment: narrow one, or attach twice under two names"
                )
            _reached(name, modules, observed)
            if given is not None and given.condition_dim not in (None, condition_dim):
                raise SiteError(
                    f"the Site of {pattern!r} says condition_dim={given.condition_dim}, the "
                    f"attachment {condition_dim}; say it to plan or attach alone"
                )
            found = _features(pattern, name, module, placement, given, observed)
            site = _site(config, name, found, condition_dim, encoding)
            base = getattr(type(module), "_condmod_base", type(module)).__name__
            sites.append(
                PlannedSite(base, pattern, config, placement, site, found.argument, found.item)
            )
    base = sum(parameter.numel() for parameter in model.parameters())
    made = Plan(tuple(sites), condition_dim, encoding, start, base)
    made.parameters()  # says what does not fit before anything is built
    if start == "base":
        check_starts((planned.config, planned.site) for planned in sites)
    return made


def check_model(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        SiteError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise SiteError(f"a model is a torch.nn.Module; got {model!r:.80}")


def build_bank(sites: list[PlannedSite]) -> Bank:
    """The modulators of the sites of one pattern."""
    return Bank(sites[0].config, {planned.site.name: planned.site for planned in sites})


def starting_as_base(config: ModulatorConfig) -> ModulatorConfig:
    """The same options with those unsaid that a component needs to start as the base.

    Raises:
        SiteError: they contradict the options that were said.
    """
    options = {name: getattr(config, name) for name in config.model_fields_set}
    for name, value in config.component.as_base(config).items():
        options.setdefault(name, value)
    inner = getattr(config, "inner", None)
    if isinstance(inner, ModulatorConfig):
        options["inner"] = starting_as_base(inner)
    try:
        return type(config).from_options(options)
    except SpecError as error:
        rule = str(error).partition("\n")[0]
        raise SiteError(
            f"{config} cannot start as the base: {rule}; leave that option out, or ask for "
            "start='published'"
        ) from None


def _chosen(pattern: str, choice: Any) -> tuple[ModulatorConfig, Placement, Site | None]:
    """The config, placement and hand-written site of a pattern."""
    spec, *rest = choice if isinstance(choice, tuple | list) else (choice,)
    config = cast(ModulatorConfig, configure(spec, role="modulator"))
    features = issubclass(config.component, Modulator)
    placement: Any = ""
    given = None
    for item in rest:
        if isinstance(item, Site) and given is None:
            given = item
        elif item in get_args(Placement) and not placement:
            placement = item
        else:
            raise SiteError(
                f"the pattern {pattern!r} has a spec, or a tuple of a spec with a placement "
                f"('input', 'output' or 'around') or a Site; got {item!r:.80}"
            )
    placement = placement or ("output" if features else "around")
    check_placement(config, placement, pattern)
    return config, placement, given


def check_placement(config: ModulatorConfig, placement: Placement, pattern: str) -> None:
    """Check that a modulator can act where it is placed.

    Raises:
        SiteError: it turns features into features and is placed around, or the reverse.
    """
    features = issubclass(config.component, Modulator)
    if features == (placement == "around"):
        what = "turns features into features" if features else "acts around a sublayer"
        fit = "'input' or 'output'" if features else "'around'"
        raise SiteError(
            f"{config.component_name()} {what}, so its placement is {fit}; the pattern "
            f"{pattern!r} says {placement!r}"
        )


def _one_part(config: ModulatorConfig) -> ModulatorConfig:
    """The same options for one sublayer, where it is not said how many.

    Raises:
        SiteError: it serves several.
    """
    said = {name: getattr(config, name) for name in config.model_fields_set}
    if "parts" in type(config).model_fields:
        if said.get("parts", 1) == 1:
            return type(config).from_options({**said, "parts": 1})
        one = call(config.component_name(), {**config.changed(), "parts": 1})
        raise SiteError(
            f"{config} serves {said['parts']} sublayers at once, and a site is around one module; "
            f"say {one}"
        )
    parts = getattr(config.component, "parts", 1)
    if parts != 1:
        raise SiteError(
            f"{config} serves {parts} sublayers at once, and a site is around one module"
        )
    return config


def _reached(name: str, modules: Mapping[str, nn.Module], observed: Observed | None) -> None:
    """Refuse a module that the model never calls.

    Raises:
        SiteError: why it is not called.
    """
    above = modules.get(name.rpartition(".")[0])
    if isinstance(above, nn.MultiheadAttention):
        raise SiteError(
            f"the site {name!r} would never act: MultiheadAttention reads its projection's weight "
            "and does not call it; place the site on the attention's output"
        )
    parts = name.split(".")
    for depth in range(1, len(parts)):
        above = modules.get(".".join(parts[:depth]))
        blocks = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        if isinstance(above, blocks) and not above.self_attn.batch_first:
            raise SiteError(
                f"no site can stand at {name!r}: it lies in a {type(above).__name__} with "
                "batch_first=False, which has its batch at dim 1"
            )
    if observed is not None and not observed.called(modules[name]):
        raise SiteError(f"the site {name!r} would never act: the example does not reach it")


def _features(
    pattern: str,
    name: str,
    module: nn.Module,
    placement: Placement,
    given: Site | None,
    observed: Observed | None,
) -> Features:
    """The features at a module: as said by hand, known of its class, or seen on the example.

    Raises:
        SiteError: none of them tells.
    """
    if given is not None:
        known = infer(module, placement)
        said = (given.features, given.channel_dim)
        if not isinstance(known, Features):
            return Features(*said, first_argument(module), 0)
        if known.channel_dim == said[1] and known.features != said[0]:
            raise SiteError(
                f"the Site of {pattern!r} says features={said[0]}, but {name!r} "
                f"({type(module).__name__}) has {known.features}"
            )
        return Features(*said, known.argument, known.item)
    found = infer(module, placement)
    if isinstance(found, Unknown) and observed is not None:
        seen = observed.infer(module, placement)
        found = seen if isinstance(seen, Features) else Unknown(f"{found}; {seen}")
    if isinstance(found, Unknown):
        how = "" if observed is not None else "give an example=..., or "
        raise SiteError(
            f"the features at {name!r} ({type(module).__name__}) cannot be inferred: {found}; "
            f"{how}say them: {{{pattern!r}: (spec, condmod.Site(features=..., channel_dim=...))}}"
        )
    if isinstance(found, str):
        raise SiteError(f"no site can stand at {name!r} ({placement}): {found}")
    return found


def _site(
    config: ModulatorConfig,
    name: str,
    found: Features,
    condition_dim: int | None,
    encoder: EncoderConfig | None,
) -> Site:
    """The site of one module.

    Raises:
        SiteError: the component and the attachment's condition do not belong together.
    """
    owns = bool(config.component.kinds & {"raw", "self"})
    if owns and encoder is not None:
        raise SiteError(
            f"{config} has an encoder of its own; leave out encoder={str(encoder)!r}, or attach "
            "what it holds inside"
        )
    if not owns and condition_dim is None:
        raise SiteError(
            f"{config} needs the width of its condition: say condition_dim=..., or encoder=..."
        )
    return Site(found.features, None if owns else condition_dim, found.channel_dim, name=name)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ranges(names: list[str]) -> str:
    """Names that differ in their numbers as one: blocks.0-11.norm1, or with stars and a count."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    varied = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    parts = [column[0] for column in columns]
    if len(varied) == 1:
        numbers = sorted(map(int, columns[varied[0]]))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            parts[varied[0]] = f"{numbers[0]}-{numbers[-1]}"
            return ".".join(parts)
    for i in varied:
        parts[i] = "*"
    return f"{'.'.join(parts)} ({len(names)})"


def _times(number: int, each: int) -> str:
    return f"{each:,}" if number == 1 else f"{number} x {each:,}"


def _part(total: int, base: int) -> str:
    """How many parameters these are against the model's."""
    return (
        f"{total / base:.2%} of the model's"
        if total < base
        else f"{total / base:.1f} times the model's"
    )


def _aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns under their titles; those of numbers end at one place."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numbers = {head.index("features"), head.index("parameters")}
    return "\n".join(
        "  ".join(
            word.rjust(width) if i in numbers else word.ljust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )
