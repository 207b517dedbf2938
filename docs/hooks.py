"""Native mkdocs hooks: what the site says of components and commands comes from the live code.

A page holds a marker on a line of its own, and the hook puts in its place what is known:

    <!-- component: film -->             one component; the spec is what parameters are counted of
    <!-- components: modulators -->      a table of all modulators (or encoders)
    <!-- command: list -->               one command of the command line
    <!-- laws: modulators -->            a table of the laws in condmod.testing (or encoders)
    <!-- fields: condmod_lab.config.TrainConfig -->    a table of a pydantic model's fields

The catalogue's part of the navigation is the registry's list, so `--strict` misses no page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import typer
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import condmod
from condmod.cli import app
from condmod.testing import ENCODER_LAWS, MODULATOR_LAWS

FEATURES, CONDITION = 64, 128
MARKER = re.compile(r"^<!-- (component|components|command|laws|fields): (.+) -->$", re.MULTILINE)
_SECTION = re.compile(r"\A(Shapes|Init|Source):\n(.*)\Z", re.DOTALL)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_START = re.compile(r"(?:^|(?<=[.] ))([a-z]+): ")
_CATALOGUE = Path(__file__).parent / "catalogue"


def on_config(config: Any) -> Any:
    """Put a page per component of this distribution into the navigation."""
    for item in config.nav or ():
        if "Catalogue" in item:
            item["Catalogue"] += [
                {title: [{name: f"catalogue/{name}.md"} for name in names(role)]}
                for title, role in (("Modulators", "modulators"), ("Encoders", "encoders"))
            ]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the markers of a page; links are relative to where the page stands."""
    up = "../" * page.file.src_uri.count("/")
    return expand(markdown, f"{up}catalogue/")


def expand(markdown: str, catalogue: str = "") -> str:
    """Expand every marker.

    Args:
        markdown: a page.
        catalogue: what leads from the page to the catalogue's folder.
    """
    renderers: dict[str, Callable[[str], str]] = {
        "component": component,
        "components": lambda role: components(role, catalogue),
        "command": command,
        "laws": laws,
        "fields": fields,
    }
    expanded = MARKER.sub(lambda found: renderers[found[1]](found[2]), markdown)
    shown = [found[2] for found in MARKER.finditer(markdown) if found[1] == "component"]
    return "\n\n".join([expanded, *map(source_file, shown)])


@cache
def names(role: str) -> list[str]:
    """Names of this distribution's modulators or encoders."""
    known = condmod.list_modulators() if role == "modulators" else condmod.list_encoders()
    registry = condmod.Registry()
    return [name for name in known if registry.entry(name).distribution == "condmod"]


@dataclass(frozen=True)
class Sample:
    """One component built at a sample place, and what was counted there."""

    spec: str
    module: nn.Module
    passes: int | None

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


@cache
def sample(spec: str) -> Sample:
    """Build a spec at the sample place: features 64, condition 128, an encoder's width 128."""
    config = condmod.configure(spec)
    torch.manual_seed(0)
    if config.role == "encoder":
        return Sample(spec, condmod.create_encoder(config, CONDITION), None)
    raw = "raw" in config.component.kinds
    site = condmod.Site(FEATURES, None if raw else CONDITION)
    module: Any = condmod.create(config, site)
    condition = raw_condition(config) if raw else torch.randn(2, CONDITION)
    return Sample(spec, module, passes(module, condition))


def raw_condition(config: Any) -> Any:
    """Step or class 0 for two samples: for each input where the encoder has several."""
    zeros = torch.zeros(2, dtype=torch.long)
    inputs = getattr(getattr(config, "encoder", None), "inputs", None)
    return zeros if inputs is None else dict.fromkeys(inputs, zeros)


def passes(module: Any, condition: Any) -> int:
    """How many eager float32 operators read the features, for one part."""
    x = torch.randn(2, 32, FEATURES)
    with torch.no_grad():
        modulation = module.generate(condition)
        with _Readers(x.numel()) as readers:
            if isinstance(module, condmod.Modulator):
                module.modulate(x, modulation)
            else:
                module.exit(x, module.enter(x, modulation[0], None), modulation[0], None)
    return readers.count


class _Readers(TorchDispatchMode):
    """Counts the operators that read a tensor of `size` elements and return no view."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        large = [arg for arg in args if isinstance(arg, Tensor) and arg.numel() >= self.size]
        first = out[0] if isinstance(out, tuple) else out
        storages = {arg.untyped_storage().data_ptr() for arg in large}
        self.count += bool(large) and first.untyped_storage().data_ptr() not in storages
        return out


def component(spec: str) -> str:
    """What the registry knows of one component, as Markdown."""
    known = condmod.describe(condmod.parse(spec).name)
    summary, body, sections = _parts(known.doc)
    lines = [f"{summary}\n{{ .equation }}", *body, _facts(spec)]
    lines += ["## Options", _options(known) if known.options else "It has no options."]
    lines += ["## Shapes", sections["Shapes"]]
    lines += ["## At the start", _starts(sections["Init"])]
    lines += ["## Source", _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", sections["Source"])]
    return "\n\n".join(lines)


def source_file(spec: str) -> str:
    """The component's file, whole, folded."""
    path = _file(condmod.parse(spec).name)
    code = path.read_text(encoding="utf-8").rstrip().replace("\n", "\n    ")
    return (
        "## The file { data-search-exclude }\n\n"
        f'??? abstract "{path.parent.name}/{path.name}"\n    ```python\n    {code}\n    ```\n'
    )


def components(role: str, catalogue: str) -> str:
    """A table of every modulator or encoder: equation, conditions, cost at the sample place."""
    modulators = role == "modulators"
    head = "| | What it computes |" + (" Conditions | Passes |" if modulators else "")
    lines = [f"{head} Parameters |", "|---|---|" + "---|---:|" * modulators + "---:|"]
    for name in names(role):
        known = condmod.describe(name)
        built = sample(page_spec(name))
        row = [f"[`{name}`]({catalogue}{name}.md)", _cell(known.summary)]
        if modulators:
            row += [", ".join(f"`{kind}`" for kind in known.kinds), _passes(built)]
        lines.append(f"| {' | '.join([*row, f'{built.parameters:,}'])} |")
    return "\n".join(lines)


def page_spec(name: str) -> str:
    """The spec in the marker of a component's page."""
    page = (_CATALOGUE / f"{name}.md").read_text(encoding="utf-8")
    return next(found[2] for found in MARKER.finditer(page) if found[1] == "component")


def command(name: str) -> str:
    """One command: what it does, its usage, arguments and options, an example."""
    group: Any = typer.main.get_command(app)
    found = group.get_command(None, name)
    text, _, example = (found.help or "").partition("Example:")
    arguments = [p for p in found.params if p.param_type_name == "argument"]
    options = [p for p in found.params if p.param_type_name == "option"]
    words = [_word(p) if p.required else f"[{_word(p)}]" for p in arguments]
    needed = [f"{p.opts[0]} {_type(p)}" for p in options if p.required]
    usage = " ".join(["condmod", name, *words, *needed, "[OPTIONS]" if options else ""]).rstrip()
    lines = [text.strip(), f"```text\n{usage}\n```"]
    if found.params:
        rows = ["| Argument or option | | Default |", "|---|---|---|"]
        rows += [_parameter(p) for p in (*arguments, *options)]
        lines.append("\n".join(rows))
    lines.append(f"```bash\n{example.strip()}\n```")
    return "\n\n".join(lines)


def laws(role: str) -> str:
    """A table of the laws that `condmod.testing` holds."""
    known: dict[str, Any] = MODULATOR_LAWS if role == "modulators" else ENCODER_LAWS
    rows = [f"| `{name}` | {_cell(law.__doc__ or '')} |" for name, law in known.items()]
    return "\n".join(["| Function | What it checks |", "|---|---|", *rows])


def fields(path: str) -> str:
    """A table of every field of a pydantic model and of the models inside it, by dotted name."""
    module, _, name = path.rpartition(".")
    rows = _field_rows(getattr(import_module(module), name), "")
    return "\n".join(["| Field | | Default |", "|---|---|---|", *rows])


def _field_rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    properties = model.model_json_schema()["properties"]
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += _field_rows(kind, f"{prefix}{name}.")
            continue
        low, high = (properties[name].get(side) for side in ("minimum", "maximum"))
        bounds = f" From {low} to {high}." if None not in (low, high) else ""
        default = str(info.default)
        shown = default if len(default) < 40 else f"{default.partition('(')[0]}(...)"
        words = f"{_cell(info.description or '')}{bounds}"
        rows.append(f"| `{prefix}{name}` | {words} | `{shown}` |")
    return rows


def _parts(doc: str) -> tuple[str, list[str], dict[str, str]]:
    """A docstring as its summary, further paragraphs, and sections by title."""
    summary, *rest = doc.split("\n\n")
    sections = {}
    body = []
    for paragraph in rest:
        if found := _SECTION.match(paragraph):
            sections[found[1]] = " ".join(found[2].split())
        else:
            body.append(paragraph)
    return summary, body, sections


def _starts(text: str) -> str:
    """The section on initialisation, a list where it names several values of `init`."""
    before, *named = _START.split(text)
    pairs = zip(named[::2], named[1::2], strict=True)
    return "\n".join([before, *(f"- `{name}`: {words.strip()}" for name, words in pairs)]).strip()


def _facts(spec: str) -> str:
    known = condmod.describe(condmod.parse(spec).name)
    built = sample(spec)
    encoder = known.role == "encoder"
    shapes = [f"`{key}` {tuple(value.shape)}" for key, value in built.module.state_dict().items()]
    place = f"width {CONDITION}" if encoder else f"{FEATURES} features"
    place += "" if encoder or "raw" in known.kinds else f", a condition of {CONDITION}"
    facts = {
        "What it is": _what(built.module),
        "Conditions": ", ".join(f"`{kind}`" for kind in known.kinds),
        "Also called": ", ".join(f"`{alias}`" for alias in known.aliases),
        "Parameters": f"{built.parameters:,} for `{spec}` at {place}",
        "State": ", ".join(shapes) or "empty",
        "Passes over x": "" if encoder else _passes(built),
        "Parameters beside x": ""
        if encoder
        else "yes, in `modulate`"
        if known.site_params
        else "none",
        "Laws waived": "; ".join(f"`{law}`: {why}" for law, why in known.waivers.items()) or "none",
    }
    rows = [f"| **{key}** | {_cell(value)} |" for key, value in facts.items() if value]
    return "\n".join(["| At a glance | |", "|---|---|", *rows])


def _what(module: nn.Module) -> str:
    if isinstance(module, condmod.Encoder):
        return "encoder: raw signal to condition"
    if isinstance(module, condmod.SublayerModulator):
        return "modulator around sublayers"
    return "modulator: features to features"


def _passes(built: Sample) -> str:
    around = isinstance(built.module, condmod.SublayerModulator)
    return f"{built.passes} per part" if around else str(built.passes)


def _options(known: Any) -> str:
    rows = ["| Option | Values | Default | |", "|---|---|---|---|"]
    for option in known.options:
        values = " ".join(f"`{v}`" for v in option.type.split(" | "))
        values = values if "'" in option.type else option.type.replace(" | ", " or ")
        default = "required" if option.default == "required" else f"`{option.default}`"
        rows.append(f"| `{option.name}` | {values} | {default} | {_cell(option.description)} |")
    return "\n".join(rows)


def _file(name: str) -> Path:
    return Path(condmod.describe(name).entry.file)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _word(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _type(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    annotation = parameter.type_descriptor.annotation
    kinds = {int: "INTEGER", float: "NUMBER", bool: ""}
    return kinds.get(annotation, "TEXT")


def _parameter(parameter: Any) -> str:
    default = parameter.default
    empty = default is None or default is False or default == ""
    shown = "required" if parameter.required else "" if empty else f"`{default}`"
    if parameter.param_type_name == "argument":
        name = _word(parameter)
    else:
        name = f"{', '.join(parameter.opts)} {_type(parameter)}".rstrip()
    bounds = [str(parameter.min)] if parameter.min is not None else []
    bounds += [f"to {parameter.max}"] if bounds and parameter.max is not None else []
    words = _cell(parameter.help or "") + (f" From {' '.join(bounds)}." if bounds else "")
    words += " May be given more than once." if parameter.multiple else ""
    return f"| `{name}` | {words} | {shown} |"
