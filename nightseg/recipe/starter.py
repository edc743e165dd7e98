"""A first recipe for a folder of labelled day frames and one of night frames, with comments: `nightseg init`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from string import Template
from typing import Any, Final, NamedTuple

import yaml

from nightseg.data.class_list import taxonomy
from nightseg.data.discover import Found, discover
from nightseg.data.settings import ClassList
from nightseg.data.taxonomy import COLORS, packed, unpacked
from nightseg.errors import UserError
from nightseg.recipe.load import load_recipe
from nightseg.storage import Location
from nightseg.translators.settings import LitClasses

_SHORT_SIDE: Final = {False: 240, True: 512}  # pixels that frames are resized to, without and with a GPU
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {  # parts of names by which classes are known to the translator
    "sky": ("sky", "heaven", "himmel", "ciel"),
    "vehicle": (
        "car",
        "truck",
        "bus",
        "van",
        "motorcycle",
        "motorbike",
        "vehicle",
        "automobile",
        "lorry",
        "trailer",
        "rickshaw",
    ),
    "signal": ("traffic light", "trafficlight", "traffic_light", "signal"),
    "facade": ("building", "window", "house", "facade"),
    "lamp": ("pole", "lamp", "street light", "streetlight", "street_light", "polegroup"),
}


_TEXT: Final = Template("""# Written by `nightseg init` from $day_folder and $night_folder. Assumed:
$assumed
# To check:
$checks
# Then:
#   nightseg check $file
#   nightseg run $file
name: $name

$taxonomy
roots:
  day: $day_root
  night: $night_root

compute:
$compute
datasets:
  day: $day_set # $num_day frames
  day_test: $test_set # $num_test frames
$nights  # labelled nights to be tested on, if you have some: a dataset night_test, and test_sets.night: night_test
  day_by_optics: {translate: day, by: optics, fresh: true} # another night with every sample

translators:
  optics: # nights from black skies to skies that lamps in haze turn grey or orange; learns nothing
    kind: photometric
    stops: [-4.5, -1.0]
    temperature: [2200.0, 8000.0]
    sky: [0.02, 0.5]
    glow: [0.0, 0.25]
    tint: 0.15
$lit
# frames are resized to input_size (height, width), here from $frame_height x $frame_width; $encoder_hint
network: {encoder: efficientnet_lite0, input_size: [$height, $width], pyramid_channels: 64, head_channels: 64}

training: # $training_hint
  optimizer: adamw
  learning_rate: 3.0e-3
  weight_decay: 0.01
  batch: $batch
  epochs: 6
  steps_per_epoch: $steps
  warmup_steps: 20
  crop: $crop
  augmentation: {scale: [0.6, 1.6], brightness: 0.4, contrast: 0.3, saturation: 0.4}

loss: {kind: combined, alpha: 0.5, gamma: 2.0}

models:
  day_only: {train: [day]}
  day_only_longer: # the control of equal steps: what more training alone is worth
    train: [day]
    start: day_only
    training: {learning_rate: 1.5e-3, epochs: 12, ema_decay: 0.99}
  day_and_night: # two of three samples by night: a teacher must have seen dark skies before it teaches
    train: {day: 1, day_by_optics: 2}
    start: day_only
    training: {learning_rate: 1.5e-3, ema_decay: 0.99}
  adapted: # labels the night frames while it learns, and learns what it is sure of
    train: {day: 1, day_by_optics: 2}
    start: day_and_night
    training: {learning_rate: 1.5e-3, ema_decay: 0.99}
    self_training:
      mode: online
      pool: night
      threshold: {kind: class_balanced, share: 0.4, confidence: 0.95, floor: 0.8}
      online: {weight: 0.5} # where sky is never below the road: never_below: {sky: [road]} beside threshold

test_sets: {day: day_test}

predictions: # the report shows them
  night: {dataset: night, model: adapted}

consistency: {dataset: night, count: 50} # how sure and consistent each model is by night, where no label tells
""")


class AlreadyThere(UserError):  # noqa: N818 a UserError by its base
    """The recipe exists, and nobody allowed to overwrite it."""


class Starter(NamedTuple):
    """What was written, what was assumed, and what a person should look at."""

    recipe: str
    files: list[str]
    found: dict[str, Any]
    assumed: list[str]
    to_check: list[str]


def write_starter(
    day: str, night: str, out: str, *, labels: str | None = None, classes: str | None = None, overwrite: bool = False
) -> Starter:
    """Look at two folders and write a recipe that fits them, and split lists beside it, if there is no split.

    Raises UserError: what `discover` raises; AlreadyThere.
    """
    place = Location.of(out)
    if not place.uri.lower().endswith((".yaml", ".yml")):
        raise UserError(f"{out}: a recipe is a YAML file", cure="give it a name that ends in .yaml")
    if place.exists() and not overwrite:
        raise AlreadyThere(f"{out}: it is there already", cure="give another name, or allow to overwrite it")
    roots = {"day": Location.of(day), "night": Location.of(night)}
    found = discover(roots["day"], roots["night"], None if labels is None else Location.of(labels), classes)
    if found.is_named:
        found.to_check += LitClasses(**_lit_classes(found)).unknown("optics", taxonomy(found.taxonomy).classes)
    stem, files = place.uri.rpartition(".")[0], [place.uri]
    for name, names in found.lists.items():
        file = Location.of(f"{stem}_{name}.txt")
        file.write_bytes("".join(f"{one}\n" for one in names).encode())
        files.append(file.uri)
        (found.day if name == "day" else found.test)["split_list"] = file.uri
    place.write_bytes(_text(found, roots, PurePosixPath(place.uri)).encode())
    load_recipe(place)
    facts = {"num": found.num, "size": list(found.size), "encoding": found.encoding, "layout": found.day["layout"]}
    return Starter(place.uri, files, facts, found.assumed, found.to_check)


def _text(found: Found, roots: Mapping[str, Location], place: PurePosixPath) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "_", place.stem)
    name = name if re.match("[A-Za-z]", name) else f"run_{name}"
    cores, has_gpu = len(os.sched_getaffinity(0)), shutil.which("nvidia-smi") is not None
    night = dict(found.night) | {"root": "{night}"}
    if found.is_sorted:
        nights = f"  night: {_flow(night | {'domain': 'night'})} # {found.num['night']} frames, no labels\n"
    else:
        nights = f"  pool: {_flow(night)} # {found.num['night']} frames, day and night\n"
        nights += "  night: {split: pool, keep: night} # by luminance histograms: look with `nightseg split`\n"
    height, width = _input_size(found.size, _SHORT_SIDE[has_gpu])
    workers, batch = _workers_and_batch(1 if has_gpu else min(cores, 4), found.num["day"])
    compute = (
        f"  train: {{workers: 1, cpus_per_worker: {max(1, cores - 1)}, gpus_per_worker: 1}}\n"
        f"  map: {{actors: 1, cpus_per_actor: {max(1, cores - 1)}, gpus_per_actor: 1, batch: 8, shard_rows: 64}}\n"
        if has_gpu
        else f"  train: {{workers: {workers}, cpus_per_worker: 1}} # of {cores} cores; "
        "with a GPU: {workers: 1, cpus_per_worker: 8, gpus_per_worker: 1}\n"
        "  map: {actors: 0, batch: 8, shard_rows: 64} # with a GPU: {actors: 1, gpus_per_actor: 1, cpus_per_actor: 8}\n"
    )
    day, test = ({"layout": one["layout"], "root": "{day}", **one, "domain": "day"} for one in (found.day, found.test))
    return _TEXT.substitute(
        day_folder=roots["day"],
        night_folder=roots["night"],
        assumed=_lines(found.assumed),
        checks=_lines(found.to_check or ["nothing that was noticed"]),
        file=place.name,
        name=name,
        taxonomy=_taxonomy(found),
        day_root=_flow(roots["day"].uri),
        night_root=_flow(roots["night"].uri),
        compute=compute,
        day_set=_flow(day),
        num_day=found.num["day"],
        test_set=_flow(test),
        num_test=found.num["test"],
        nights=nights,
        lit=_lit(found),
        frame_height=found.size[0],
        frame_width=found.size[1],
        height=height,
        width=width,
        encoder_hint="resnet50 is better and needs its weights" if has_gpu else "more pixels are better and slower",
        training_hint="short: more epochs are worth it" if has_gpu else "of a few cores; more epochs are worth it",
        batch=batch,
        steps=200 if has_gpu else 50,
        crop=[max(32, int(0.8 * side) // 32 * 32) for side in (height, width)],
    )


def _workers_and_batch(most_workers: int, num_day: int) -> tuple[int, int]:
    """A batch that the workers share evenly, and so is half of it: what online self-training takes from the pool."""
    most = min(8, num_day)
    workers = max(1, min(most_workers, most // 2))
    return workers, max(1, most // (2 * workers) * 2 * workers)


def _lines(sentences: Sequence[str]) -> str:
    return "\n".join(f"#   - {line}" for line in sentences)


def _flow(value: Any) -> str:
    """A value in one line of YAML, quoted where it needs to be."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _taxonomy(found: Found) -> str:
    if isinstance(found.taxonomy, str):
        return f"taxonomy: {_flow(found.taxonomy)}\n"
    listed, classes = found.taxonomy, taxonomy(found.taxonomy)
    lines = ["taxonomy: # in the order of the train ids: names, colours of pictures, and what the label files hold"]
    if listed.name != ClassList.model_fields["name"].default:
        lines.append(f"  name: {_flow(listed.name)}")
    lines.append("  classes:")
    by_class: dict[int, list[int]] = {}
    ids = classes.colors if found.encoding == COLORS else classes.encodings.get(found.encoding, {})
    for raw_id in found.seen:
        by_class.setdefault(ids.get(raw_id, -1), []).append(raw_id)
    for train_id, one in enumerate(listed.classes):
        colour = list(classes.palette[train_id])
        told = "" if found.encoding == COLORS or (not one.ids and one.ids != 0) else f", ids: {_ids(one.ids)}"
        lines.append(
            f"    - {{name: {_flow(one.name)}, color: {colour}{told}}}{_comment(found, by_class.get(train_id, []))}"
        )
    ignored = [raw_id for raw_id, train_id in ids.items() if train_id == 255 and raw_id >= 0]
    if found.encoding == COLORS:
        colours = [list(unpacked(raw_id)) for raw_id in ignored if raw_id != packed((0, 0, 0))]
        lines.append(
            f"  ignore: {{colors: {colours}}} # and black, unless it is the colour of a class; `rest`: all others"
        )
    else:
        shown = [raw_id for raw_id in ignored if raw_id != 255]
        lines.append(f"  ignore: {shown} # ids without a class, beside 255; `rest`: all that no class has")
    return "\n".join(lines) + "\n"


def _ids(ids: Any) -> str:
    return str(ids.get("ids", ids)) if isinstance(ids, dict) else str(ids)


def _comment(found: Found, raw_ids: list[int]) -> str:
    """Where the pixels of a class lie, by which a person knows what it is."""
    if not raw_ids:
        return " # not seen in the labels looked at"
    seen = [found.seen[raw_id] for raw_id in raw_ids]
    share = sum(one.share for one in seen)
    height = sum(one.height * one.share for one in seen) / share
    where = "high in the image" if height < 0.35 else "low in the image" if height > 0.65 else "in the middle"
    return (
        f" # {100 * share:.2g} % of the pixels, {where}, in {100 * max(one.files for one in seen):.0f} % of the frames"
    )


def _roles(found: Found) -> dict[str, list[str]]:
    """Which classes are the sky, vehicles, ..., by words in their names."""
    names = taxonomy(found.taxonomy).classes
    return {
        role: [
            name
            for name in names
            if any(re.search(rf"(^|[^a-z]){word}(e?s)?($|[^a-z])", name.lower()) for word in words)
        ]
        for role, words in _WORDS.items()
    }


def _lit_classes(found: Found) -> dict[str, list[str]]:
    """Classes of one's own by their usual words, where the translator would not know them by name."""
    roles = _roles(found)
    return {role: names for role, names in roles.items() if set(names) - set(LitClasses.model_fields[role].default)}


def _lit(found: Found) -> str:
    told = _lit_classes(found)
    return f"    classes: {_flow(told)}\n" if told else ""


def _input_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Of the shape of the frames, not larger than they are, in steps of 16."""
    factor = min(1.0, short_side / min(size))
    height, width = (max(64, round(side * factor / 16) * 16) for side in size)
    return height, width
