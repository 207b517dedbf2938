"""Native mkdocs hooks: what the site says of components and commands comes from the live code.

A page holds a marker on a line of its own, and the hook puts in its place what is known:

    <!-- component: film -->             one component; the spec is what parameters are counted of
    <!-- components: modulators -->      a table of all modulators (or encoders)
    <!-- command: list -->               one command of the command line
    <!-- laws: modulators -->            a table of the laws in condmod.testing (or encoders)
    <!-- codecs: modulators -->          a table of the published layouts that `convert` knows
    <!-- fields: condmod_lab.config.TrainConfig -->    a table of a pydantic model's fields
    <!-- comparison: benchmarks/results/which-conv.json -->    what `condmod compare` has found
    <!-- conformance: docs/conformance.json -->    which law each component keeps
    <!-- parity: docs/parity.json -->    a table of what the parity tests found
    <!-- matrix: torch.func -->          a part of docs/attaching-matrix.json: where attach works

The catalogue's part of the navigation is the registry's list, so `--strict` misses no page.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from torch import nn

import condmod
from condmod.care.cost import cost
from condmod.cli import app
from condmod.testing import ENCODER_LAWS, MODULATOR_LAWS

FEATURES, CONDITION = 64, 128
MARKER = re.compile(
    r"^<!-- (component|components|command|laws|codecs|fields|comparison|parity|conformance|matrix)"
    r": (.+) -->$",
    re.MULTILINE,
)
_SECTION = re.compile(r"\A(Shapes|Init|Source):\n(.*)\Z", re.DOTALL)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_START = re.compile(r"(?:^|(?<=[.] ))([a-z]+): ")
_CATALOGUE = Path(__file__).parent / "catalogue"
_ROOT = Path(__file__).parent.parent
_COMMAND_WIDTH = 88
_SPEC_WIDTH = 34
_log = logging.getLogger("mkdocs.hooks")  # whose warnings end a strict build


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
        "codecs": lambda role: codecs(role, catalogue),
        "fields": fields,
        "comparison": comparison,
        "parity": lambda path: parity(path, catalogue),
        "conformance": lambda path: conformance(path, catalogue),
        "matrix": matrix,
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
    site: condmod.Site | None = None
    shared: nn.Module | None = None
    passes: tuple[str, ...] | None = None

    @property
    def parameters(self) -> int:
        """The number of all parameters, those that sites share included."""
        return sum(value.numel() for part in self._parts.values() for value in part.parameters())

    @property
    def state(self) -> list[str]:
        """Keys and shapes of the state dict; of what sites share, by the keys of a bank."""
        return [
            f"`{prefix}{key}` {tuple(value.shape)}"
            for prefix, part in self._parts.items()
            for key, value in part.state_dict().items()
        ]

    @property
    def _parts(self) -> dict[str, nn.Module]:
        return {"": self.module} | ({"shared.": self.shared} if self.shared is not None else {})


@cache
def sample(spec: str) -> Sample:
    """Build a spec at the sample place: features 64, condition 128, an encoder's width 128."""
    config = condmod.configure(spec)
    torch.manual_seed(0)
    if config.role == "encoder":
        return Sample(spec, condmod.create_encoder(config, CONDITION), None)
    kinds = config.component.kinds
    width = FEATURES if config.component.name == "adain" else CONDITION  # a style's features
    site = condmod.Site(FEATURES, None if kinds & {"raw", "self"} else width)
    bank = condmod.create_bank(config, {"here": site})
    count = cost(config, features=FEATURES, condition_dim=width).passes
    return Sample(spec, bank["here"], site, bank.shared, count)


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
    """A table for every family: equation, conditions, cost at the sample place."""
    modulators = role == "modulators"
    head = "| | What it computes |" + (" Conditions | Passes |" if modulators else "")
    families: dict[str, list[str]] = {}
    for name in names(role):
        known = condmod.describe(name)
        built = sample(page_spec(name))
        row = [f"[`{name}`]({catalogue}{name}.md)", _cell(known.summary)]
        if modulators:
            row += [", ".join(f"`{kind}`" for kind in known.kinds), _passes(built)]
        lines = families.setdefault(known.entry.module, [])
        lines.append(f"| {' | '.join([*row, f'{built.parameters:,}'])} |")
    rule = "|---|---|" + "---|---:|" * modulators + "---:|"
    return "\n\n".join(
        "\n".join([f"{import_module(family).__doc__}\n", f"{head} Parameters |", rule, *lines])
        for family, lines in families.items()
    )


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


def codecs(role: str, catalogue: str) -> str:
    """A table of components and the published layouts that `convert` knows for them."""
    rows = [
        f"| [`{name}`]({catalogue}{name}.md) | {', '.join(f'`{source}`' for source in sources)} |"
        for name in names(role)
        if (sources := condmod.describe(name).sources)
    ]
    return "\n".join(["| Component | Sources |", "|---|---|", *rows])


def fields(path: str) -> str:
    """A table of every field of a pydantic model and of the models inside it, by dotted name."""
    module, _, name = path.rpartition(".")
    rows = _field_rows(getattr(import_module(module), name), "")
    return "\n".join(["| Field | | Default |", "|---|---|---|", *rows])


def _field_rows(model: type[BaseModel], prefix: str) -> list[str]:
    """A row per field; of a choice of sections a row per variant, each with its fields below."""
    rows = []
    properties = model.model_json_schema()["properties"]
    for name, info in model.model_fields.items():
        place, inner = prefix + name, _models(info.annotation)
        if len(inner) > 1:
            for kind in inner:
                rows += _variant_rows(kind, place, default=isinstance(info.default, kind))
        elif inner == [info.annotation]:
            rows += _field_rows(inner[0], f"{place}.")
        else:
            words = f"{_cell(info.description or '')}{_allowed(properties[name])}"
            rows.append(f"| `{place}` | {words} | {_default(info)} |")
    return rows


def _variant_rows(model: type[BaseModel], place: str, *, default: bool) -> list[str]:
    [name] = get_args(model.model_fields["name"].annotation)
    words = _cell(model.__doc__ or "") + " The default." * default
    _, *own = _field_rows(model, f"{place}.")
    return [f"| **`{place}.name: {name}`** | **{words}** | |", *own]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The model that a field is, or those that it may be."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [kind for argument in get_args(annotation) for kind in _models(argument)]


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a field's JSON schema says of its values."""
    if "enum" in schema:
        return f" One of {', '.join(f'`{value}`' for value in schema['enum'])}."
    if "maximum" in schema and "minimum" in schema:
        return f" From {schema['minimum']} to {schema['maximum']}."
    if "maximum" in schema and "exclusiveMinimum" in schema:
        return f" Above {schema['exclusiveMinimum']}, to {schema['maximum']}."
    return ""


def _default(info: FieldInfo) -> str:
    """A default as YAML has it."""
    if info.is_required():
        return "required"
    if info.default is None:
        return ""
    return f"`{info.default if isinstance(info.default, str) else json.dumps(info.default)}`"


def comparison(path: str) -> str:
    """What a `results.json` of `condmod compare` holds: tables, standings, what they rest on.

    Args:
        path: the file, seen from the repository's root. Where it cannot be read, the page says so,
            and a strict build fails.
    """
    from condmod_lab import comparison_report as shown

    try:
        document = json.loads((_ROOT / path).read_text(encoding="utf-8"))
        cells = shown.table_cells(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s holds no comparison: %s: %s", path, type(error).__name__, error)
        return f"*{path} holds no comparison.*"
    figures, specs = document["figures"], document["specs"]
    short = {spec: _short(spec, specs) for spec in specs}
    tables = []
    for measured in (True, False):  # in one table they would be too wide
        names = [name for name in figures if bool(figures[name]["reduce"]) == measured]
        headings = [shown.column_heading(figures[name]) for name in names]
        headings = [re.sub(" (?=[↑↓])", "\xa0", heading) for heading in headings]
        rows = [
            [f"`{_cell(short[spec])}`", *(_figure(cells[name, spec]) for name in names)]
            for spec in specs
        ]
        table = [["", *headings], ["---", *["---:"] * len(names)], *rows]
        tables.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    key = "**Bold\\*** is the best mean, ~ is not told apart from it."
    key += " Below a mean is the standard deviation over seeds." * (len(document["seeds"]) > 1)
    facts = [f"| {name} | {_cell(words)} |" for name, words in shown.at_a_glance(document)]
    standings = [
        f"- **{figures[name]['title']}**: "
        + re.sub("`([^`]*)`", lambda found: f"`{short.get(found[1], found[1])}`", words)
        for name, words in document["standings"].items()
    ]
    cautions = [document["caution"], "Not told apart is no proof of equality."]
    cautions += [f"Failed: {run}: {error}" for run, error in document["failed"].items()]
    if (jobs := document["machine"]["jobs"]) > 1:
        cautions.append(f"Times were taken with {jobs} runs side by side.")
    parts = [
        f"```bash\n{_wrapped(shlex.split(document['command']))}\n```",
        "\n".join(["| At a glance | |", "|---|---|", *facts]),
        key,
        *tables,
        "\n".join(standings),
        '!!! note "Keep in mind"\n\n' + "\n".join(f"    - {words}" for words in cautions),
    ]
    return "\n\n".join(parts)


def parity(path: str, catalogue: str) -> str:
    """A table of the components that equal a class of another package, and how closely.

    Args:
        path: what the parity tests have written, seen from the repository's root.
        catalogue: what leads from the page to the catalogue's folder.
    """
    largest: dict[tuple[str, ...], float] = {}  # rows that differ in nothing shown are one
    for row in json.loads((_ROOT / path).read_text(encoding="utf-8")):
        shown = (
            f"[`{row['mechanism']}`]({catalogue}{row['mechanism']}.md)",
            f"{_cell(row['what'])}<br><small>{row['peer']} {row['version']}; "
            f"{_cell(row['shapes'])}</small>",
            row["dtype"],
            f"{row['tolerance']:g}",
        )
        largest[shown] = max(largest.get(shown, 0.0), row["difference"])
    rows = [
        f"| {mechanism} | {what} | {f'{found:.1e}' if found else '0'}"
        f"<br><small>of {tolerance}, {dtype}</small> |"
        for (mechanism, what, dtype, tolerance), found in largest.items()
    ]
    heads = "| Mechanism | There, and what went in | Difference, of tolerance |"
    return "\n".join([heads, "|---|---|---:|", *rows])


def conformance(path: str, catalogue: str) -> str:
    """Two tables, components by laws: kept, or a number that says below why it is not checked.

    Args:
        path: what the laws' tests have written, seen from the repository's root.
        catalogue: what leads from the page to the catalogue's folder; MkDocs resolves no link in
            raw HTML, so these name the pages as they are served.
    """
    cells = json.loads((_ROOT / path).read_text(encoding="utf-8"))
    reasons: dict[str, int] = {}
    parts = []
    for title, known in (("Modulators", MODULATOR_LAWS), ("Encoders", ENCODER_LAWS)):
        heads = "".join(f"<th><span>{law}</span></th>" for law in known)
        rows = [
            f'<tr><td><a href="../{catalogue}{name}/"><code>{name}</code></a></td>'
            + "".join(f"<td>{_verdict(row[law], reasons)}</td>" for law in known)
            + "</tr>"
            for name, row in cells.items()
            if set(row) == set(known)
        ]
        body = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        parts.append(f'## {title}\n\n<div class="matrix" markdown="0"><table>{body}</table></div>')
    listed = "\n".join(f"{number}. {_cell(why)}" for why, number in reasons.items())
    legend = (
        "✓: the component keeps the law. A number: the law does not apply, for the reason below. "
        "Both: it applies to some of the component's cases.\n\n" + listed
    )
    return "\n\n".join([*parts, "## Legend", legend])


def _verdict(cell: dict[str, Any], reasons: dict[str, int]) -> str:
    """A tick where any case keeps the law, and a number for each reason why others are skipped."""
    numbers = [reasons.setdefault(why, len(reasons) + 1) for why in cell["skipped"]]
    notes = f"<sup>{' '.join(map(str, numbers))}</sup>" if numbers else ""
    return f"{'✓' if cell['kept'] else ''}{notes}"


def matrix(group: str) -> str:
    """A table of one group of the cells that the tests of attaching have measured."""
    cells = json.loads((_ROOT / "docs" / "attaching-matrix.json").read_text(encoding="utf-8"))
    rows = [
        f"| {cell['verdict']} | {_cell(cell['what'])}"
        + (f"<br><small>{_cell(cell['reason'])}</small> |" if cell["reason"] else " |")
        for cell in cells
        if cell["group"] == group
    ]
    if not rows:
        _log.warning("docs/attaching-matrix.json has no group %r: run `make matrix`", group)
    return "\n".join(["| Found | What |", "|---|---|", *rows])


def _short(spec: str, specs: list[str]) -> str:
    """A long spec without its options, where it is then still told from the others."""
    name = spec.partition("(")[0]
    alone = sum(other.partition("(")[0] == name for other in specs) == 1
    return f"{name}(...)" if alone and len(spec) > _SPEC_WIDTH else spec


def _figure(cell: Any) -> str:
    mean = {"best": f"**{cell.mean}**\\*", "tied": f"{cell.mean}~"}.get(cell.mark, cell.mean)
    return f"{mean}<br><small>{cell.spread}</small>" if cell.spread else mean


def _wrapped(words: Iterable[str]) -> str:
    """A command line, wrapped and quoted as a person would."""
    first, *rest = map(_quoted, words)
    lines = [first]
    for word in rest:
        if len(lines[-1]) + len(word) < _COMMAND_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def _quoted(word: str) -> str:
    plain = shlex.quote(word)
    return plain if plain == word or set(word) & set('"$`\\!') else f'"{word}"'


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
    place = f"width {CONDITION}" if built.site is None else f"{FEATURES} features"
    if built.site and built.site.condition_dim:
        place += f", a condition of {built.site.condition_dim}"
    if built.shared is not None:
        place += ", with what sites share"
    facts = {
        "What it is": _what(built),
        "Conditions": ", ".join(f"`{kind}`" for kind in known.kinds),
        "Also called": ", ".join(f"`{alias}`" for alias in known.aliases),
        "Parameters": f"{built.parameters:,} for `{spec}` at {place}",
        "State": ", ".join(built.state) or "empty",
        "Passes over x": "" if encoder else _passes(built),
        "Parameters beside x": ""
        if encoder
        else "yes, in `modulate`"
        if known.site_params
        else "none",
        "Published layouts": ", ".join(f"`{source}`" for source in known.sources),
        "Laws waived": "; ".join(f"`{law}`: {why}" for law, why in known.waivers.items()) or "none",
    }
    rows = [f"| **{key}** | {_cell(value)} |" for key, value in facts.items() if value]
    return "\n".join(["| At a glance | |", "|---|---|", *rows])


def _what(built: Sample) -> str:
    if isinstance(built.module, condmod.Encoder):
        return "encoder: raw signal to condition"
    around = isinstance(built.module, condmod.SublayerModulator)
    what = "modulator around sublayers" if around else "modulator: features to features"
    return what if built.shared is None else f"{what}; its sites share parameters: `create_bank`"


def _passes(built: Sample) -> str:
    if built.passes is None:
        return "its sublayer's"
    around = isinstance(built.module, condmod.SublayerModulator)
    return f"{len(built.passes)} per part" if around else str(len(built.passes))


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
