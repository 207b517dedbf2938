"""The commands that tell of components. Listing imports no plugin and no torch."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any

import typer

from condmod.cli.printing import Json, print_json, print_table
from condmod.entries import installed_entries, shut_out
from condmod.errors import CondmodError
from condmod.registry import default_registry

_FEATURES, _WIDTH = 64, 128
Features = Annotated[int, typer.Option(min=1, help="C of the place whose cost is told.")]
Width = Annotated[int, typer.Option(min=1, help="D, the condition's width there.")]


def list_(
    pattern: Annotated[str, typer.Argument(help="Wildcard over names.")] = "*",
    exclude: Annotated[list[str] | None, typer.Option(help="Wildcard to leave out.")] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Equation, conditions, start and cost; loads them.")
    ] = False,
    features: Features = _FEATURES,
    condition_dim: Width = _WIDTH,
    as_json: Json = False,
) -> None:
    """List the components that are installed; imports none of them, but with --long.

    Example: condmod list "*film*" --exclude "dense*"
    """
    registry = default_registry()
    entries = [entry for entry in installed_entries() if not shut_out(entry.distribution)]
    rows = []
    for name in registry.match(pattern, exclude=exclude or ()):
        claims = [entry for entry in entries if entry.name == name]
        owners = " and ".join(sorted({entry.provenance for entry in claims}))
        roles = sorted({entry.role for entry in claims})  # two only where they conflict
        rows += [{"name": name, "role": role, "from": owners} for role in roles]
    if long:
        rows = [_told(row, features, condition_dim) for row in rows]
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(
            f"nothing installed matches {pattern!r}; '*word*' matches inside names", err=True
        )
        return
    print_table(tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])


def show(
    spec: Annotated[
        str, typer.Argument(metavar="NAME-or-SPEC", help="A component, or a spec of one.")
    ],
    features: Features = _FEATURES,
    condition_dim: Width = _WIDTH,
    as_json: Json = False,
) -> None:
    """Show one component: equation, shapes, init, source, options, cost, where it comes from.

    Example: condmod show dense_film --features 320 --condition-dim 1280
    """
    from condmod.build import configure
    from condmod.description import describe
    from condmod.parsing import parse

    name = parse(spec).name
    description = describe(name)
    if spec != name:
        configure(spec)
    costs, why = _cost(spec, features, condition_dim)
    if as_json:
        print_json({**description.to_dict(), "cost": costs})
        return
    entry = description.entry
    typer.echo(f"{description.name} ({description.role}, {entry.provenance})")
    typer.echo(
        f"{name} is another name of {description.name}\n" if name != description.name else ""
    )
    typer.echo(f"{description.doc}\n")
    if description.kinds:
        typer.echo(f"Conditions: {', '.join(description.kinds)}")
    if description.sources:
        typer.echo(f"Published layouts (condmod.convert): {', '.join(description.sources)}")
    for law, reason in description.waivers.items():
        typer.echo(f"Law waived: {law}: {reason}")
    place = f"features={features}, condition_dim={condition_dim}"
    if description.role == "encoder":
        place = f"out_dim={condition_dim}"
    if costs is None:
        typer.echo(f"Cost at {place}: {why}")
    else:
        shared = f" and {costs['shared']:,} that all sites share" if costs["shared"] else ""
        typer.echo(f"Parameters at {place}: {costs['parameters']:,}{shared}")
        if costs["passes"] is not None:
            per = " for each part" if description.around else ""
            typer.echo(f"Passes over x in eager mode{per}: {_counted(costs['passes'])}")
    typer.echo("Options:" if description.options else "Options: none")
    for option in description.options:
        typer.echo(f"  {option.name}: {option.type} = {option.default}")
        typer.echo(f"      {option.description}")
    typer.echo(f"Defined in {entry.file}:{entry.line}")


def _told(row: dict[str, Any], features: int, condition_dim: int) -> dict[str, Any]:
    """A row of the long list."""
    from condmod.description import describe

    try:
        description = describe(row["name"])
    except CondmodError as error:
        told = {"name": row["name"], "role": row["role"], "equation": str(error).split("\n")[0]}
        return {key: told.get(key, "") for key in _LONG}
    costs, _ = _cost(row["name"], features, condition_dim)
    inits = [option.type for option in description.options if option.name == "init"]
    parameters = "" if costs is None else f"{costs['parameters'] + costs['shared']:,}"
    passes = "" if costs is None or costs["passes"] is None else str(len(costs["passes"]))
    return {
        "name": row["name"],
        "role": row["role"],
        "conditions": ", ".join(description.kinds),
        "init": ", ".join(inits).replace("'", "").replace(" |", ","),
        "parameters": parameters,
        "passes": passes,
        "source": ", ".join(dict.fromkeys(_ARXIV.findall(description.doc))),
        "equation": description.summary,
    }


_LONG = ("name", "role", "conditions", "init", "parameters", "passes", "source", "equation")
_ARXIV = re.compile(r"arXiv:\d{4}\.\d{4,5}")


def _cost(spec: str, features: int, condition_dim: int) -> tuple[dict[str, Any] | None, str]:
    """What a component costs, or why that cannot be told."""
    from condmod.care.cost import cost

    try:
        return cost(spec, features=features, condition_dim=condition_dim)._asdict(), ""
    except CondmodError as error:
        return None, str(error).partition("\n")[0]


def _counted(passes: tuple[str, ...]) -> str:
    """How many, and which."""
    which = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(passes).items())
    return f"{len(passes)} ({which})" if passes else "none"
