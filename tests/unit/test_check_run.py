"""Which recipe may go on in which folder (R3, R6)."""

from __future__ import annotations

import pytest

from nestseg.core.errors import RunError
from nestseg.engine.checkpoint import checkpoint_folder
from nestseg.engine.train import check_run
from nestseg.recipes import resolve_recipe


def make_run(folder, *overrides: str, steps: tuple[int, ...] = (0, 3)):
    (folder / "recipe.yaml").write_text(resolve_recipe("demo", overrides).to_yaml(), encoding="utf-8")
    for step in steps:
        checkpoint_folder(folder, step).mkdir(parents=True)


def test_checkpoints_without_their_recipe_are_not_taken_for_a_free_folder(tmp_path):
    make_run(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="E-RUN-004"):
        check_run(tmp_path, resolve_recipe("demo"), resume=False, allow_fresh=True)


@pytest.mark.parametrize("steps", [(), (0,)])
def test_a_folder_whose_run_was_killed_before_it_began_is_free(tmp_path, steps):
    make_run(tmp_path, steps=steps)
    (tmp_path / "recipe.yaml").unlink()
    assert check_run(tmp_path, resolve_recipe("demo"), resume=False) == []


@pytest.mark.parametrize(
    "change", ["data.num_workers=3", "data.worker_timeout=9", "log.every_steps=7", "checkpoint.every_steps=7"]
)
def test_what_no_weight_depends_on_may_change(tmp_path, change):
    make_run(tmp_path)
    assert len(check_run(tmp_path, resolve_recipe("demo", [change]), resume=True)) == 1


@pytest.mark.parametrize("change", ["seed=1", "optimizer.lr=0.1", "data.crop_size=[64, 64]", "ema.decay=0.9"])
def test_all_else_needs_a_word(tmp_path, change):
    make_run(tmp_path)
    recipe = resolve_recipe("demo", [change])
    with pytest.raises(RunError, match=f"E-RUN-006.*{change.partition('=')[0].partition('.')[0]}"):
        check_run(tmp_path, recipe, resume=True)
    assert check_run(tmp_path, recipe, resume=True, accept_changes=True)


@pytest.mark.parametrize("change", ["optimizer.name=sgd", "optimizer.options={amsgrad: true}", "optimizer.momentum=0"])
def test_an_optimizer_that_cannot_take_the_state_over_is_refused(tmp_path, change):
    make_run(tmp_path)
    with pytest.raises(RunError, match="E-RUN-008"):
        check_run(tmp_path, resolve_recipe("demo", [change]), resume=True, accept_changes=True)
