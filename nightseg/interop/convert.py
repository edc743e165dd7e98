"""Checkpoints of detectron2 as model folders, and back."""

from __future__ import annotations

import colorsys
import io
from typing import Any, Final

import safetensors.torch
import torch

from nightseg.data.taxonomy import Taxonomy, taxonomy
from nightseg.interop.detectron2_checkpoint import CONV1, from_detectron2, read_checkpoint, to_detectron2, unfold
from nightseg.interop.detectron2_config import OURS, Facts, check_input, config_text, read_facts
from nightseg.networks.model_folder import CARD, load_tensors, save_model
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD
from nightseg.segmenter.network import architecture_of
from nightseg.storage import Location, UserError, sha256_of

KEEPSAKE: Final = "detectron2.safetensors"  # in a converted model's folder: the first convolution as it was
_GOLDEN_RATIO: Final = 0.618034


def convert_from_detectron2(
    checkpoint: Location,
    out: Location,
    *,
    config: Location | None = None,
    stated: Facts | None = None,
    classes: str | None = None,
    unfreeze: bool = False,
) -> dict[str, Any]:
    """Write the model folder `out` of a .pth or .pkl checkpoint; returns what was done with its tensors.

    `config` is detectron2's config.yaml, `stated` its facts by hand; one of them is needed. `classes` is a taxonomy by
    name or file; without it the classes have numbers for names. `unfreeze`: let frozen batch norms learn from now on.
    Raises UserError, and then `out` is not touched: no facts, `out` is a model already, another number of classes, or
    a checkpoint that `from_detectron2` refuses.
    """
    facts = _facts(checkpoint, config, stated)
    if (out / CARD).exists():
        raise UserError(f"{out} is a model folder already; give another folder, or delete it first")
    try:
        data = checkpoint.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no checkpoint {checkpoint}; give a .pth or .pkl file") from None
    found = from_detectron2(read_checkpoint(data, str(checkpoint)), facts, str(checkpoint), unfreeze=unfreeze)
    num_classes = found.architecture["num_classes"]
    names = _classes(classes, num_classes, checkpoint)
    facts = facts._replace(norm=found.architecture["norm"], depth=None)
    source = {"file": checkpoint.name, "bytes": len(data), "sha256": sha256_of(data), "left_out": found.left_out}
    if config is not None:
        source["config_sha256"] = sha256_of(config.read_bytes())
    card = {
        "kind": "semantic_fpn",
        **found.architecture,
        "taxonomy": {"name": names.name, "classes": list(names.classes), "palette": [list(c) for c in names.palette]},
        "input_size": None,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "start": "detectron2",
        "parents": [],
        "detectron2": {"facts": _listed(facts), "source": source},
    }
    if not torch.equal(unfold(found.tensors[CONV1], facts), found.conv1):
        (out / KEEPSAKE).write_bytes(safetensors.torch.save({CONV1: found.conv1}))
    save_model(out, found.tensors, card)
    return {
        "model": str(out),
        **found.architecture,
        "taxonomy": names.name,
        "input": f"{facts.channels}, mean {facts.pixel_mean}, deviation {facts.pixel_std} in the checkpoint; folded "
        "into the first convolution",
        "tensors": len(found.tensors),
        "left_out": found.left_out,
        "added": found.added,
        "sha256": source["sha256"],
    }


def convert_to_detectron2(folder: Location, out: Location) -> dict[str, Any]:
    """Write the checkpoint `out` (.pth) and beside it a config (.yaml) for detectron2's SemanticSegmentor.

    `folder`: a model folder. One that came from detectron2 goes back to the input and, if it has not
    learned since, to the bits it had; any other takes RGB with ImageNet's mean and deviation. Raises UserError: not a
    ResNet, a head that detectron2 cannot build, or another file name.
    """
    if not out.name.endswith(".pth"):
        raise UserError(f"{out}: detectron2 knows its checkpoints by their ending; give a name that ends with .pth")
    tensors, card = load_tensors(folder)
    if card["kind"] != "semantic_fpn":
        raise UserError(f"{folder}: a model of kind {card['kind']!r}; detectron2 gets segmenters (semantic_fpn)")
    architecture = architecture_of(card)
    known = card.get("detectron2", {}).get("facts")
    facts = Facts(**{**known, **{key: tuple(known[key]) for key in ("pixel_mean", "pixel_std")}}) if known else OURS
    facts = facts._replace(**{key: architecture[key] for key in ("norm", "freeze_at", "stride_in_1x1")})
    keepsake = folder / KEEPSAKE
    conv1 = safetensors.torch.load(keepsake.read_bytes())[CONV1] if keepsake.exists() else None
    theirs = to_detectron2(tensors, architecture, facts, conv1, str(folder))
    buffer = io.BytesIO()
    torch.save({"model": theirs, "__author__": "nightseg"}, buffer)
    config = out.parent / f"{out.name.removesuffix('.pth')}.yaml"
    config.write_bytes(config_text(facts, architecture, card["num_classes"]).encode())
    out.write_bytes(buffer.getbuffer())
    return {
        "checkpoint": str(out),
        "config": str(config),
        "input": f"{facts.channels}, mean {facts.pixel_mean}, deviation {facts.pixel_std}",
        "tensors": len(theirs),
        "classes": card["taxonomy"]["classes"],
    }


def _facts(checkpoint: Location, config: Location | None, stated: Facts | None) -> Facts:
    if config is not None and stated is not None:
        raise UserError("--config and the options that replace it exclude each other; give the config alone")
    if config is not None:
        return read_facts(config)
    if stated is not None:
        check_input(stated, "the options")
        return stated
    beside = checkpoint.parent / "config.yaml"
    found = f"one lies beside the checkpoint: --config {beside}" if beside.exists() else "give it with --config FILE"
    raise UserError(
        f"{checkpoint}: what its network is fed with, and where its ResNet has its strides, stands in detectron2's "
        f"config.yaml and not in the checkpoint; {found}. Or state it: the networks of detectron2's model zoo are "
        "--channels BGR --pixel-mean 103.53,116.28,123.675 --pixel-std 1,1,1 --stride-in-1x1"
    )


def _classes(name: str | None, num_classes: int, checkpoint: Location) -> Taxonomy:
    if name is None:
        palette = tuple(_colour(index) for index in range(num_classes))
        return Taxonomy(f"numbers{num_classes}", tuple(f"class {index}" for index in range(num_classes)), palette, {})
    classes = taxonomy(name)
    if classes.num_classes != num_classes:
        raise UserError(
            f"{checkpoint} predicts {num_classes} classes, the taxonomy {classes.name} has {classes.num_classes}; give "
            "the taxonomy it was trained with, or none"
        )
    return classes


def _colour(index: int) -> tuple[int, int, int]:
    """Hues that keep apart, however many there are."""
    red, green, blue = colorsys.hsv_to_rgb(
        index * _GOLDEN_RATIO % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index % 3) / 2
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def _listed(facts: Facts) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts._asdict().items()}
