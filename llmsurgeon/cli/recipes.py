"""`llmsurgeon recipes`: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsurgeon.cli import tell


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, copy and check recipes.")
    group.command("ls")(list_recipes)
    group.command("show")(show_recipe)
    group.command("cp")(copy_recipe)
    group.command("check")(check_recipe)
    app.add_typer(group, name="recipes")


Name = Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe, or a file.", show_default=False)]


def list_recipes() -> None:
    """List the recipes that come with llmsurgeon."""
    from llmsurgeon.recipe.files import builtin_recipes, read_document

    recipes = builtin_recipes()
    for name, path in recipes.items():
        data = read_document(path).data
        tell(f"{name:{max(map(len, recipes))}}  {data.get('description', '')}")


def show_recipe(name: Name) -> None:
    """Print a recipe."""
    from llmsurgeon.recipe.files import find_recipe, recipe_text

    tell(recipe_text(find_recipe(name)), end="")


def copy_recipe(
    name: Name,
    dest: Annotated[
        Path, typer.Argument(metavar="[DEST]", help="A file, or a folder to put NAME.yaml into.", show_default=False)
    ] = Path("."),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Copy a recipe, to edit it."""
    from llmsurgeon.boundary.foreign import local_path
    from llmsurgeon.checkpoint.atomic import write_whole
    from llmsurgeon.errors import SurgeryError
    from llmsurgeon.recipe.files import find_recipe, recipe_text

    source, dest = find_recipe(name), local_path(dest)
    text = recipe_text(source)
    target = dest / source.name if dest.is_dir() else dest
    try:
        write_whole(target, text.encode(), overwrite=overwrite)
    except FileExistsError:
        raise SurgeryError(f"{target} exists; name another file or pass --overwrite") from None
    except OSError as error:
        raise SurgeryError(f"{target}: cannot be written: {error.strerror}") from None
    tell(target)


def check_recipe(
    name: Annotated[str, typer.Argument(metavar="FILE", help="A recipe file, or a built-in recipe.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change one value first; may be repeated."),
    ] = None,
) -> None:
    """Check a recipe and name every problem in it, with its line."""
    from llmsurgeon.recipe.recipe import load

    recipe = load(name, changes or ())
    steps = ", ".join(step.op for step in recipe.steps)
    tell(f"{name}: fine, {len(recipe.steps)} step{'s' if len(recipe.steps) > 1 else ''}: {steps}")
