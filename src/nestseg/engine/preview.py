"""Draw the samples that a recipe trains on."""

from __future__ import annotations

from pathlib import Path

from nestseg.build import build_dataset, build_plan, build_transform
from nestseg.recipe import Recipe
from nestseg.report.preview import write_preview


def preview_recipe(recipe: Recipe, data_root: Path | None, *, out: Path, num_images: int = 12) -> tuple[Path, Path]:
    """Draw the first samples of the first epoch as a sheet and a page.

    Args:
        recipe: Whose data and augmentation.
        data_root: Folder of the data set; None for one that needs no files.
        out: Folder to write to; made if absent.
        num_images: How many samples.

    Returns:
        The PNG and the HTML file.

    Raises:
        DataError: If the data cannot be read.
        OSError: If something cannot be written.
    """
    dataset = build_dataset(recipe, data_root, split=recipe.data.train_split)
    return write_preview(
        dataset,
        build_transform(recipe, dataset),
        plan=build_plan(recipe, dataset),
        name=recipe.name,
        out=out,
        num_images=num_images,
    )
