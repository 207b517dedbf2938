"""What is known of a component, for people to read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from condmod.config import Kind, Role
from condmod.entries import Entry, located
from condmod.registry import Registry, active_registry
from condmod.spec import show
from condmod.tables import html_table


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a component, for people to read."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of a component: `describe` makes it, `condmod show` and the docs print it."""

    name: str
    role: Role
    summary: str
    doc: str
    kinds: tuple[Kind, ...]
    site_params: bool
    around: bool
    aliases: tuple[str, ...]
    waivers: Mapping[str, str]
    sources: tuple[str, ...]
    options: tuple[Option, ...]
    entry: Entry

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def _repr_html_(self) -> str:
        head = f"<h4>{escape(self.name)}</h4><p>{escape(self.summary)}</p>"
        kinds = f"<p>Conditions: {escape(', '.join(self.kinds))}</p>" if self.kinds else ""
        rows = [(o.name, o.type, o.default, o.description) for o in self.options]
        return head + kinds + html_table(("option", "type", "default", ""), rows)


def describe(name: str, *, registry: Registry | None = None) -> Description:
    """Describe one component: its docstring, kinds, options and where it comes from.

    Raises:
        UnknownNameError: nothing has this name.
        PluginError: the plugin that provides it failed.
    """
    registry = active_registry() if registry is None else registry
    cls = registry.load(name)
    doc = inspect.cleandoc(cls.__doc__ or "")
    properties = cls.Config.model_json_schema().get("properties", {})
    options = tuple(
        Option(
            key,
            _type_words(properties.get(key, {})),
            "required" if info.is_required() else show(info.get_default(call_default_factory=True)),
            " ".join((info.description or "").split()),
        )
        for key, info in cls.Config.model_fields.items()
    )
    return Description(
        name=cls.name,
        role=cls.Config.role,
        summary=doc.split("\n\n")[0].replace("\n", " "),
        doc=doc,
        kinds=tuple(sorted(getattr(cls, "kinds", ()))),
        site_params=getattr(cls, "site_params", False),
        around=hasattr(cls, "around"),
        aliases=(*cls.aliases, *cls.deprecated),
        waivers=dict(cls.waivers),
        sources=tuple(codec.source for codec in registry.codecs(name)),
        options=options,
        entry=located(registry.entry(name), cls),
    )


def _type_words(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in few words."""
    if "x-condmod" in schema:
        return f"{schema['x-condmod']} spec"
    if "enum" in schema:
        return " | ".join(repr(value) for value in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " | ".join(_type_words(part) for part in schema["anyOf"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type_words(schema.get('items', {}))}"
    if kind == "object":
        return f"mapping of {_type_words(schema.get('additionalProperties', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("exclusiveMinimum") is not None:
        above = f"{kind} above {schema['exclusiveMinimum']:g}"
        return above + (f" to {high:g}" if high is not None else "")
    if low is not None and high is not None:
        return (
            f"{kind} from {low:g} to {high:g}"
            if kind == "number"
            else f"{kind} from {low} to {high}"
        )
    return {"null": "None"}.get(kind, kind)
