"""The commands of the core. Only those that build or describe a component import torch."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from condmod.config import ComponentConfig
from condmod.entries import installed_entries, shut_out
from condmod.errors import SpecError
from condmod.registry import default_registry
from condmod.spec import nearest

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]


def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcard over names.")] = "*",
    exclude: Annotated[list[str] | None, typer.Option(help="Wildcard to leave out.")] = None,
    as_json: Json = False,
) -> None:
    """List the components that are installed; imports none of them.

    Example: condmod list "*film*" --exclude "dense*"
    """
    registry = default_registry()
    rows = []
    for name in registry.match(pattern, exclude=exclude or ()):
        owners = [entry for entry in installed_entries() if entry.name == name]
        owners = [entry for entry in owners if not shut_out(entry.distribution)]
        conflict = " and ".join(sorted({entry.provenance for entry in owners}))
        rows.append({"name": name, "role": owners[0].role, "from": conflict})
    if as_json:
        _print_json(rows)
        return
    _table(("name", "role", "from"), [tuple(row.values()) for row in rows])


def show(
    name: Annotated[str, typer.Argument(help="Name of a component.")],
    as_json: Json = False,
) -> None:
    """Show one component: equation, shapes, init, source, options, where it comes from.

    Example: condmod show dense_film
    """
    from condmod.description import describe

    description = describe(name)
    if as_json:
        _print_json(description.to_dict())
        return
    entry = description.entry
    typer.echo(f"{description.name} ({description.role}, {entry.provenance})\n")
    typer.echo(f"{description.doc}\n")
    if description.kinds:
        typer.echo(f"Conditions: {', '.join(description.kinds)}")
    for law, reason in description.waivers.items():
        typer.echo(f"Law waived: {law}: {reason}")
    typer.echo("Options:" if description.options else "Options: none")
    for option in description.options:
        typer.echo(f"  {option.name}: {option.type} = {option.default}")
        typer.echo(f"      {option.description}")
    typer.echo(f"Defined in {entry.file}:{entry.line}")


def validate(
    spec: Annotated[str, typer.Argument(metavar="SPEC-or-FILE", help="Spec text, or a YAML file.")],
    kind: Annotated[str, typer.Option("--as", help="What a YAML file describes.")] = "",
    as_json: Json = False,
) -> None:
    """Check a spec, or a YAML file, and print it with every option filled in.

    Example: condmod validate "film(scale='one_plus')"
    """
    from condmod.build import configure

    if Path(spec).suffix in {".yaml", ".yml", ".json"}:
        resolved = _validate_file(Path(spec), kind)
    else:
        resolved = configure(spec).model_dump(mode="json")
    if as_json:
        _print_json(resolved)
        return
    from condmod import yaml_text

    typer.echo(yaml_text.dump(resolved).rstrip())


def schema(
    name: Annotated[
        str, typer.Argument(help="A component, or a kind of YAML file; all components if left out.")
    ] = "",
) -> None:
    """Print the JSON Schema of specs as mappings, for editors and other programs.

    Example: condmod schema film
    """
    registry = default_registry()
    if name and name not in registry:
        from condmod.cli.documents import documents

        kinds = documents()
        if name not in kinds:
            registry.entry(name)  # raises, with the nearest name
        _print_json(kinds[name].model.model_json_schema())
        return
    names = [name] if name else registry.names()
    schemas = [_component_schema(registry.load(each).Config) for each in names]
    _print_json(schemas[0] if name else {"oneOf": schemas})


def doctor(as_json: Json = False) -> None:
    """Load every plugin and say what is wrong; exit code 1 if something is.

    Example: condmod doctor
    """
    import torch

    registry = default_registry()
    verdicts = registry.check()
    wrong = {name: verdict for name, verdict in verdicts.items() if verdict}
    versions = {
        "condmod": metadata.version("condmod"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
    }
    if as_json:
        _print_json(
            {"versions": versions, "components": verdicts, "tracebacks": registry.quarantine}
        )
    else:
        typer.echo("  ".join(f"{key} {value}" for key, value in versions.items()))
        typer.echo(f"{len(verdicts) - len(wrong)} of {len(verdicts)} components are well")
        for name, verdict in wrong.items():
            typer.echo(f"\n{name}: {verdict}")
        for module, text in registry.quarantine.items():
            typer.echo(f"\nTraceback of {module}:\n{text.rstrip()}")
    if wrong:
        raise SystemExit(1)


def plugins(as_json: Json = False) -> None:
    """List the distributions that bring components, commands or hooks; imports none of them.

    Example: condmod plugins
    """
    rows: dict[str, dict[str, Any]] = {}
    for entry in installed_entries():
        row = rows.setdefault(entry.provenance, _plugin_row(entry.distribution))
        row["components"].append(entry.name)
    for group, key in (("condmod.commands", "commands"), ("condmod.plugins", "hooks")):
        for point in metadata.entry_points(group=group):
            if point.dist:
                name = point.dist.metadata["Name"]
                row = rows.setdefault(f"{name} {point.dist.version}", _plugin_row(name))
                row[key].append(point.name)
    if as_json:
        _print_json([{"distribution": name, **row} for name, row in sorted(rows.items())])
        return
    for name, row in sorted(rows.items()):
        typer.echo(f"{name}{f' ({reason})' if (reason := row['shut_out']) else ''}")
        for key in ("components", "commands", "hooks"):
            if row[key]:
                typer.echo(f"  {key}: {', '.join(sorted(row[key]))}")


def _plugin_row(distribution: str) -> dict[str, Any]:
    return {"components": [], "commands": [], "hooks": [], "shut_out": shut_out(distribution)}


def _validate_file(path: Path, kind: str) -> Any:
    from condmod import yaml_text
    from condmod.build import configure
    from condmod.cli.documents import documents

    document = yaml_text.read(path)
    if not kind and (isinstance(document, str) or "name" in (document or {})):
        return configure(document).model_dump(mode="json")
    kinds = documents()
    kind = kind or (next(iter(kinds)) if len(kinds) == 1 else "")
    if kind not in kinds:
        raise SpecError(
            f"say what {path} describes with --as, one of {', '.join(sorted(kinds)) or 'none'}"
            f"{nearest(kind, kinds)}"
        )
    return kinds[kind].load(path).model_dump(mode="json")


def _component_schema(config: type[ComponentConfig]) -> dict[str, Any]:
    described = config.model_json_schema()
    name = {"const": config.component_name(), "type": "string"}
    return {
        **described,
        "title": config.component_name(),
        "properties": {"name": name, **described.get("properties", {})},
        "required": ["name", *described.get("required", ())],
    }


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Aligned columns; a terminal gets a title row in bold."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    title = "  ".join(word.ljust(width) for word, width in zip(head, widths, strict=True))
    typer.secho(title.rstrip(), bold=sys.stdout.isatty())
    for row in rows:
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())
