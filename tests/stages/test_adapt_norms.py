"""A model whose batch norms are adapted to a pool: another model folder, made in a run like any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nightseg.networks.model_folder import load_tensors
from nightseg.pipeline.run import run
from nightseg.progress import SilentProgress
from nightseg.recipe import load_recipe
from nightseg.storage import Location, UserError

RECIPE = """
name: x
taxonomy: camvid11
compute: {train: {workers: 1, cpus_per_worker: 1}, map: {actors: 0}}
datasets:
  day: {layout: scenes, count: 2, size: [64, 96]}
  night: {layout: scenes, count: 3, first: 50, size: [64, 96], labelled: false, mix: {night: 1.0}}
  test: {layout: scenes, count: 1, first: 90, size: [64, 96], mix: {night: 1.0}}
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {epochs: 1, steps_per_epoch: 1, batch: 2, warmup_steps: 0, crop: [64, 96], augmentation: {scale: [1.0, 1.0]}}
models:
  plain: {train: [day], start: scratch}
  adapted: {start: plain, adapt_norms: {pool: night, frames: 2}}
test_sets: {night: test}
"""


@pytest.mark.ray
def test_a_run_adapts_the_norms_of_a_model_and_tests_it(tmp_path: Path, ray_cluster: object) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    outcome = run(load_recipe(tmp_path / "r.yaml"), Location.of(tmp_path) / "run", progress=SilentProgress())
    facts = outcome.results["models"]["adapted"]
    assert facts["steps"] == 0 and facts["steps_in_all"] == 1 and not facts["learned"]["day_only"]
    assert facts["tests"]["night"]["miou"] is not None
    folder = Location.of(outcome.results["commits"]["adapt_norms/adapted"]["folder"])
    tensors, card = load_tensors(folder / "model")
    assert card["start"] == "plain" and "from 2 frames of night" in card["weights"]
    plain, _ = load_tensors(Location.of(outcome.results["commits"]["train_segmenter/plain"]["folder"]) / "model")
    changed = {name for name, value in tensors.items() if not np.array_equal(value, plain[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{start: plain}", "give train"),
        ("{start: plain, train: [day], adapt_norms: {pool: night}}", "not both"),
        ("{adapt_norms: {pool: night}}", "give its start"),
        ("{start: plain, adapt_norms: {pool: night}, training: {epochs: 2}}", "trains nothing: leave out training"),
        ("{start: plain, adapt_norms: {pool: nigt}}", "no dataset 'nigt', did you mean 'night'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(tmp_path: Path, model: str, message: str) -> None:
    text = RECIPE.replace("{start: plain, adapt_norms: {pool: night, frames: 2}}", model)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.yaml")
