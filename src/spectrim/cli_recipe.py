"""`spectrim recipe list` and `show`: requests under a name, with what they gave."""

from typing import Annotated, Any

import typer

from spectrim.cli_options import Json
from spectrim.terminal import emit, print_table, stdout

recipe_app = typer.Typer(no_args_is_help=True, help="Requests under a name, for `compress --recipe NAME`.")


@recipe_app.command("list")
def list_recipes(json_: Json = False) -> None:
    """List the recipes that come with spectrim."""
    from spectrim.recipe import load_recipe, recipe_names

    found = [load_recipe(name) for name in recipe_names()]
    rows = [{"name": r.name, "about": r.about, "request": r.request, "measured": len(r.expected)} for r in found]
    table = [[row["name"], row["about"]] for row in rows]
    emit(rows, json_, lambda: print_table("recipes", ["name", "about"], table))


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="a name of `spectrim recipe list`, or a YAML file")],
    json_: Json = False,
) -> None:
    """Show what a recipe asks for, what it gave where it was measured, and by which command."""
    from spectrim.recipe import load_recipe

    recipe = load_recipe(name)

    def show() -> None:
        stdout.print(f"{recipe.name}: {recipe.about}\n", soft_wrap=True)
        for key, value in recipe.request.items():
            stdout.print(f"  {key:18} {value}", soft_wrap=True)
        for measured in recipe.expected:
            stdout.print(f"\nmeasured on {measured.model}, {measured.device} ({measured.source}):", soft_wrap=True)
            for figure, value in measured.figures.items():
                stdout.print(f"  {figure:40} {_shown(value)}", soft_wrap=True)
            stdout.print(f"  by: {measured.command}", soft_wrap=True)
            if measured.note:
                stdout.print(f"  note: {measured.note}", soft_wrap=True)

    emit(recipe.model_dump(), json_, show)


def _shown(value: Any) -> str:
    return " / ".join(f"{one:g}" for one in value) if isinstance(value, list) else f"{value:g}"
