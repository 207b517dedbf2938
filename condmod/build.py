"""From a spec to a module: configure, create, and the fields for a user's own config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

from pydantic import GetPydanticSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

from condmod.config import (
    ComponentConfig,
    EncoderConfig,
    ModulatorConfig,
    Role,
    is_validating,
)
from condmod.errors import SiteError, SpecError
from condmod.parsing import parse
from condmod.registry import Registry, active_registry, an
from condmod.spec import Spec, nearest

if TYPE_CHECKING:
    from condmod.bank import Bank
    from condmod.encoder import Encoder
    from condmod.modulator import Modulator, SublayerModulator
    from condmod.site import Site

SpecLike: TypeAlias = "str | Mapping[str, Any] | Spec | ComponentConfig"


def configure(
    spec: SpecLike, *, role: Role | None = None, registry: Registry | None = None
) -> ComponentConfig:
    """Validate a spec into a frozen config; `configure(str(config)) == config`.

    Args:
        spec: text, a mapping with the key `name`, a Spec, or a config.
        role: refuse a component of the other role.
        registry: where to look names up; by default what is installed.

    Raises:
        SpecError: what is wrong with the text or an option, and where.
        UnknownNameError: no component of this role has the name.
        PluginError: the plugin that provides the name failed.
    """
    registry = active_registry() if registry is None else registry
    if isinstance(spec, ComponentConfig):
        if role not in (None, spec.role):
            raise SpecError(f"{spec} is {an(spec.role)}, not {an(role or spec.role)}")
        return spec
    parsed = parse(spec)
    try:
        cls = registry.load(parsed.name, role)
    except LookupError as error:
        if parsed.source is None:
            raise
        raise type(error)(f"{error}\n{parsed.source.point(())}") from None
    with registry.active():
        config: ComponentConfig = cls.Config.from_options(parsed.options, parsed)
    return config


def create(
    spec: SpecLike,
    site: Site | None = None,
    *,
    registry: Registry | None = None,
    **place: Any,
) -> Modulator[Any, Any] | SublayerModulator[Any, Any]:
    """Build a modulator for one place.

    Args:
        spec: text, mapping, Spec or config.
        site: the place; or its fields as keywords (features, condition_dim, channel_dim,
            out_features, name).
        registry: where to look names up; by default what is installed.
        **place: the fields of a Site.

    Raises:
        SpecError: as `configure`.
        SiteError: the component does not fit the place.
    """
    from condmod.site import Site

    config = configure(spec, role="modulator", registry=registry)
    if (site is None) == (not place):
        raise SiteError("say the place once: create(spec, site) or create(spec, features=..., ...)")
    site = _site(place, config) if site is None else site
    if not isinstance(site, Site):
        raise SiteError(f"the place of a modulator is a Site; got {site!r:.80}")
    cls = config.component
    if shares(config, site):
        raise SiteError(
            f"{cls.name} shares parameters between its sites; build it with "
            f"create_bank({str(config)!r}, {{{site.name or 'block'!r}: site}})"
        )
    return cast("Modulator[Any, Any]", cls(config, site))


def shares(config: ComponentConfig, site: Site) -> bool:
    """Whether the component has parameters that its sites share; nothing is drawn to find out."""
    import torch

    with torch.device("meta"):
        return config.component.shared(config, [site]) is not None


def _site(place: Mapping[str, Any], config: ComponentConfig) -> Site:
    """The site that has these fields."""
    from condmod.site import Site

    known = [field.name for field in fields(Site)]
    for key in place:
        if key in type(config).model_fields and key not in known:
            name = config.component_name()
            raise SiteError(f"{key!r} is an option; it stands in the spec: {name}({key}=...)")
        if key not in known:
            mend = nearest(key, known) or f"; it has {', '.join(known)}"
            raise SiteError(f"a site has no field {key!r}{mend}")
    if "features" not in place:
        raise SiteError("a site needs features, the number of channels, as in features=64")
    return Site(**place)


def create_encoder(
    spec: SpecLike, out_dim: int | None = None, *, registry: Registry | None = None
) -> Encoder[Any]:
    """Build an encoder whose output has `out_dim` channels (None: its native width).

    Raises:
        SpecError: as `configure`.
        SiteError: `out_dim` is no positive integer.
    """
    config = configure(spec, role="encoder", registry=registry)
    if out_dim is not None and (type(out_dim) is not int or out_dim < 1):
        raise SiteError(f"out_dim is a positive integer or None; got {out_dim!r}")
    return cast("Encoder[Any]", config.component(config, out_dim))


def create_bank(
    spec: SpecLike, sites: Mapping[str, Site], *, registry: Registry | None = None
) -> Bank:
    """Build one modulator per site and what they share, in one module that generates for all.

    Args:
        spec: text, mapping, Spec or config; the same for every site.
        sites: the places by name; dots are allowed.
        registry: where to look names up; by default what is installed.

    Raises:
        SpecError: as `configure`.
        SiteError: no site, or the component does not fit one.
    """
    from condmod.bank import Bank
    from condmod.site import Site

    if not isinstance(sites, Mapping):
        raise SiteError(
            "the sites of a bank are Sites by name, as in {'blocks.0': Site(64, 128)}; "
            f"got {type(sites).__name__}"
        )
    for name, site in sites.items():
        if not isinstance(name, str) or not isinstance(site, Site):
            raise SiteError(f"the sites of a bank are Sites by name; got {name!r}: {site!r:.80}")
    config = cast(ModulatorConfig, configure(spec, role="modulator", registry=registry))
    return Bank(config, {name: replace(site, name=name) for name, site in sites.items()})


def create_with_encoder(
    inner: SpecLike, encoder: SpecLike, site: Site
) -> tuple[Encoder[Any], Modulator[Any, Any]]:
    """Build what a modulator that owns its encoder holds: the encoder first, which sets the width.

    Raises:
        SpecError: as `configure`; also where `inner` acts around sublayers or owns an encoder.
    """
    from condmod.modulator import Modulator

    config = configure(inner, role="modulator")
    cls = config.component
    if not issubclass(cls, Modulator) or not cls.kinds & {"global", "aligned"}:
        raise SpecError(
            f"{cls.name} cannot stand inside a modulator that owns its encoder: it must turn "
            "features into features and take a global or aligned condition; "
            "build the encoder beside it with create_encoder"
        )
    built = create_encoder(encoder)
    return built, cast(
        "Modulator[Any, Any]", create(config, replace(site, condition_dim=built.out_dim))
    )


def list_modulators(pattern: str = "*", *, exclude: str | Iterable[str] = ()) -> list[str]:
    """Names of the installed modulators that match a wildcard; nothing is imported."""
    return active_registry().match(pattern, "modulator", exclude)


def list_encoders(pattern: str = "*", *, exclude: str | Iterable[str] = ()) -> list[str]:
    """Names of the installed encoders that match a wildcard; nothing is imported."""
    return active_registry().match(pattern, "encoder", exclude)


def register(cls: Any) -> Any:
    """Register a component class by hand, as in a notebook; usable as a decorator.

    Raises:
        DefinitionError: it is no concrete component.
        PluginConflictError: its name is taken.
    """
    return active_registry().register(cls)


class _SpecField(GetPydanticSchema):
    """What makes a pydantic field accept a spec of one role and hold its config."""

    def __init__(self, role: Role) -> None:
        def validate(value: Any) -> ComponentConfig:
            if is_validating():  # inside another config: it says where
                return _nested(value, role)
            try:
                return configure(value, role=role)
            except SpecError as error:
                details = {"text": str(error), "of_key": False}
                raise PydanticCustomError("condmod", "{text}", details) from None

        schema = core_schema.no_info_plain_validator_function(
            validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped),
        )
        described: dict[str, Any] = {
            "x-condmod": role,
            "anyOf": [
                {"type": "string", "description": f"spec text of {an(role)}"},
                {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            ],
        }
        super().__init__(  # a copy each time: pydantic writes a field's default into it
            lambda _source, _handler: schema, lambda _schema, _handler: deepcopy(described)
        )


class _ValidatedDefault(FieldInfo):  # type: ignore[misc]  # pydantic lets subclasses pass
    """Validates a field's default too; a plain Field would warn inside `tuple[ModulatorSpec]`."""

    __slots__ = ()


def _dumped(value: ComponentConfig | str) -> Any:
    """Plain data of a config; a default that is still text, as JSON schemas show it, stays."""
    return value if isinstance(value, str) else value.model_dump(mode="json")


def _nested(value: Any, role: Role) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return configure(value, role=role)
    spec = parse(value)
    config: ComponentConfig = (
        active_registry().load(spec.name, role).Config.model_validate(dict(spec.options))
    )
    return config


ModulatorSpec: TypeAlias = Annotated[
    ModulatorConfig | str, _SpecField("modulator"), _ValidatedDefault(validate_default=True)
]
EncoderSpec: TypeAlias = Annotated[
    EncoderConfig | str, _SpecField("encoder"), _ValidatedDefault(validate_default=True)
]
