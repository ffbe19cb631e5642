"""The whole job in minutes: train on drawn streets, evaluate, predict one picture."""

from __future__ import annotations

from pathlib import Path

from nestseg.build import build_dataset, load_predictor
from nestseg.core.image_io import write_image
from nestseg.engine.evaluate import Evaluation
from nestseg.engine.evaluate_model import evaluate_model
from nestseg.engine.predict import predict_files
from nestseg.engine.train import RECIPE_FILE, train
from nestseg.recipes import resolve_recipe


def demo(run: Path) -> Evaluation:
    """Run the ``demo`` recipe from nothing to pictures.

    Args:
        run: The run folder; a demo that was broken off there goes on, a finished one is only evaluated again.

    Returns:
        The scores of the last model on the val split. Pictures are in ``RUN/evaluation/pictures`` (image, ground
        truth, prediction and errors side by side) and ``RUN/prediction``.

    Raises:
        RunError: If the folder holds another run.
    """
    recipe = resolve_recipe("demo")
    train(recipe, None, run=run, resume=(run / RECIPE_FILE).exists())
    result = evaluate_model(run, None)
    street = run / "street.png"
    write_image(street, build_dataset(recipe, None, split="val").read(0).image)
    predict_files(load_predictor(run), [street], out=run / "prediction", overwrite=True)
    return result
