"""The whole way of every kind of translator on tiny scenes: from frames to the table in results.json and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nightseg.pipeline.run import adapt
from nightseg.progress import SilentProgress
from nightseg.report import translation_sheet
from nightseg.storage import Location

DARKEN = """
import pathlib, sys
from PIL import Image
for file in pathlib.Path(sys.argv[1]).iterdir():
    Image.open(file).point(lambda value: value // 4).save(pathlib.Path(sys.argv[2]) / file.name)
"""
RECIPE = f"""
name: tiny
taxonomy: camvid11
compute:
  train: {{workers: 1, cpus_per_worker: 1}}
  map: {{actors: 1, cpus_per_actor: 1, batch: 4, shard_rows: 3}}
datasets:
  day: {{layout: scenes, count: 5, size: [64, 96]}}
  night: {{layout: scenes, count: 4, first: 100, mix: {{night: 1.0}}, size: [64, 96], labelled: false}}
  night_test: {{layout: scenes, count: 2, first: 200, mix: {{night: 1.0}}, size: [64, 96]}}
  by_unit: {{translate: day, by: unit}}
  by_optics: {{translate: day, by: optics}}
  by_fourier: {{translate: day, by: fourier}}
  by_colour: {{translate: day, by: colour}}
  by_program: {{translate: day, by: program}}
  converted: {{translate: night_test, by: colour, to: day}}
translators:
  unit: {{day: day, night: night, width: 4, res_blocks: 1, discriminator_width: 4, discriminator_scales: 1,
         weights: {{perceptual: 0.0}}, iterations: 2, short_side: null, crop: [64, 64]}}
  optics: {{kind: photometric}}
  fourier: {{kind: fourier, night: night, beta: 0.02}}
  colour: {{kind: colour, day: day, night: night}}
  program: {{kind: command, argv: {json.dumps([sys.executable, "-c", DARKEN, "{input}", "{output}"])}}}
translations:
  by_unit: {{}}
  by_optics: {{real: night}}
  by_fourier: {{}}
  by_colour: {{}}
  by_program: {{real: night}}
network: {{encoder: efficientnet_lite0, pyramid_channels: 8, head_channels: 8}}
training: {{batch: 2, epochs: 1, steps_per_epoch: 1, warmup_steps: 0, crop: [64, 64]}}
models:
  day_only: {{train: [day]}}
  more: {{train: [day, by_optics], start: day_only}}
test_sets: {{night: night_test, converted: converted}}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("ray_cluster")
def test_every_kind_of_translator_is_evaluated_in_results_and_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = str(tmp_path / "run")
    adapted = adapt(str(tmp_path / "recipe.yaml"), [], run_dir=run, only=None, progress=SilentProgress())
    measured = (Location.of(run) / "results.json").read_json()["translations"]

    ways_back = {"by_unit": True, "by_optics": False, "by_fourier": False, "by_colour": True, "by_program": False}
    assert {name: found["has_back_translation"] for name, found in measured.items()} == ways_back
    for name, found in measured.items():
        assert (found["frames"], found["labelled"], found["segmenter"], found["real"]) == (5, 5, "day_only", "night"), (
            name
        )
        assert found["fid"]["source"] == measured["by_unit"]["fid"]["source"] > 0 < found["fid"]["translated"]
        assert set(found["kid"]) == {"translated", "source"}
        assert 0 <= found["agreement"]["pixels"] <= 1 and -1 <= found["edges"] <= 1
        assert (
            found["miou"]["source"] == measured["by_unit"]["miou"]["source"] and found["miou"]["translated"] is not None
        )
        assert (found["survival"] is not None) == (found["miou"]["back"] is not None) == ways_back[name]
    assert measured["by_colour"]["edges"] > 0.9 > measured["by_unit"]["edges"]  # two iterations: a translator of noise
    scores = adapted.outcome.results["models"]["more"]["tests"]
    assert measured["by_optics"]["models"] == {"more": {test: scores[test]["miou"] for test in ("night", "converted")}}
    assert measured["by_colour"]["models"] == {}

    page = adapted.report.read_bytes().decode()
    assert "labels, by a segmenter" in page and page.count("Least agreement") == 5
    for found in measured.values():
        assert f"{found['fid']['translated']:.2f}" in page
    sheet = Location.of(tmp_path / "sheet.png")
    assert translation_sheet(Location.of(run), adapted.outcome.results, sheet, frames=2, width=48).exists()

    again = adapt(str(tmp_path / "recipe.yaml"), [], run_dir=run, only=None, progress=SilentProgress())
    assert again.outcome.done == 0
