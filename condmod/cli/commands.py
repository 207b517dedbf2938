"""The commands on specs, plugins and models. Only those that build something import torch."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from condmod.cli.printing import Json, print_json
from condmod.config import ComponentConfig
from condmod.entries import installed_entries, owner, provenance, shut_out
from condmod.errors import SpecError
from condmod.registry import default_registry
from condmod.spec import nearest


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
        print_json(resolved)
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
        from condmod.extensions import brought

        kinds = brought("condmod_documents")
        if name not in kinds:
            registry.entry(name)  # raises, with the nearest name
        print_json(kinds[name].model.model_json_schema())
        return
    names = [name] if name else registry.names()
    schemas = [_component_schema(registry.load(each).Config) for each in names]
    print_json(schemas[0] if name else {"oneOf": schemas})


def doctor(as_json: Json = False) -> None:
    """Load every plugin and say what is wrong; exit code 1 if something is.

    Example: condmod doctor
    """
    import torch

    from condmod import extensions
    from condmod.cli import third_party

    registry = default_registry()
    verdicts = {"components": registry.check()}
    tracebacks = dict(registry.quarantine)
    for kind, room in (("commands", third_party), ("plugins", extensions)):
        checked = room.check()
        verdicts[kind] = {name: str(error or "") for name, error in checked.items()}
        for name, error in checked.items():
            if error and error.__cause__:
                text = "".join(traceback.format_exception(error.__cause__))
                tracebacks[f"{kind.removesuffix('s')} {name}"] = text
    versions = {
        "condmod": metadata.version("condmod"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
    }
    if as_json:
        print_json({"versions": versions, **verdicts, "tracebacks": tracebacks})
    else:
        typer.echo("  ".join(f"{key} {value}" for key, value in versions.items()))
        _print_verdicts(verdicts, tracebacks)
    if any(verdict for kind in verdicts.values() for verdict in kind.values()):
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
            row = rows.setdefault(provenance(point), _plugin_row(owner(point)[0]))
            row[key].append(point.name)
    for row in rows.values():
        for key in ("components", "commands", "hooks"):
            row[key] = sorted(set(row[key]))
    if as_json:
        print_json([{"distribution": name, **row} for name, row in sorted(rows.items())])
        return
    for name, row in sorted(rows.items()):
        typer.echo(f"{name}{f' ({reason})' if (reason := row['shut_out']) else ''}")
        for key in ("components", "commands", "hooks"):
            if row[key]:
                typer.echo(f"  {key}: {', '.join(row[key])}")


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODULE:CALLABLE", help="A model, or a function that gives one."),
    ],
    at: Annotated[
        list[str],
        typer.Option(help="PATTERN=SPEC; behind it @input, @output, @around, @weight; repeatable."),
    ],
    condition_dim: Annotated[int | None, typer.Option(help="D, the condition's width.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Spec of the encoder of raw signals.")] = None,
    start: Annotated[str, typer.Option(help="base or published.")] = "base",
    as_json: Json = False,
) -> None:
    """Show what `condmod.attach` would put where in a model; imports MODULE and calls CALLABLE.

    Example: condmod plan mine:build --at "blocks.*.norm1=film" --condition-dim 128
    """
    from condmod.attaching.planning import plan as planned

    found = planned(
        _model(model),
        dict(map(_pattern, at)),
        condition_dim=condition_dim,
        encoder=encoder,
        start=start,  # type: ignore[arg-type]  # plan says what it may be
    )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))


def _pattern(text: str) -> tuple[str, Any]:
    """A pattern and its spec, with a placement behind an @."""
    pattern, equals, spec = text.partition("=")
    if not equals:
        raise SpecError(f"--at takes PATTERN=SPEC, as in 'blocks.*.norm1=film'; got {text!r}")
    head, mark, placement = spec.rpartition("@")
    if not mark or not placement.isidentifier():
        return pattern, spec
    if placement not in (known := ("input", "output", "around", "weight")):
        mend = nearest(placement, known)
        raise SpecError(f"a placement is input, output, around or weight; got {placement!r}{mend}")
    return pattern, (head, placement)


def _model(text: str) -> Any:
    """What MODULE:CALLABLE gives; the folder that one stands in is searched too."""
    from torch import nn

    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise SpecError(f"the model is given as MODULE:CALLABLE, as in mine:build; got {text!r}")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise SpecError(f"{text} gave no model: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise SpecError(f"{text} gave no model: {type(made).__name__} is no torch.nn.Module")
    return made


def _plugin_row(distribution: str) -> dict[str, Any]:
    return {"components": [], "commands": [], "hooks": [], "shut_out": shut_out(distribution)}


def _validate_file(path: Path, kind: str) -> Any:
    from condmod import yaml_text
    from condmod.build import configure
    from condmod.extensions import brought, check

    document = yaml_text.read(path)
    if not isinstance(document, str | Mapping):
        came = "nothing" if document is None else f"{type(document).__name__}: {document!r:.60}"
        raise SpecError(
            f"{str(path)!r} holds a spec, as text or as a mapping with the key 'name', or a "
            f"mapping of fields; got {came}"
        )
    if not kind and (isinstance(document, str) or "name" in document):
        return configure(document).model_dump(mode="json")
    kinds = brought("condmod_documents")
    kind = kind or (next(iter(kinds)) if len(kinds) == 1 else "")
    if kind not in kinds:
        for failed in filter(None, check().values()):
            raise failed
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


def _print_verdicts(verdicts: dict[str, dict[str, str]], tracebacks: dict[str, str]) -> None:
    """How many are well, what is wrong with the others, and where it was raised."""
    for kind, checked in verdicts.items():
        well = list(checked.values()).count("")
        typer.echo(f"{well} of {len(checked)} {kind} are well")
    for kind, checked in verdicts.items():
        for name, verdict in checked.items():
            if verdict:
                owner_of = "" if kind == "components" else f"{kind.removesuffix('s')} "
                typer.echo(f"\n{owner_of}{name}: {verdict}")
    for name, text in tracebacks.items():
        typer.echo(f"\nTraceback of {name}:\n{text.rstrip()}")
