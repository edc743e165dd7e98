"""What a detectron2 config says about a Semantic FPN: what it is fed with, and how its ResNet is built.

Weights fit a network that is built otherwise, and are then silently wrong, so this is read and never guessed. A key
that a config and its bases do not have is at detectron2's default (detectron2/config/defaults.py), as in detectron2.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import yaml

from nightseg.errors import closest
from nightseg.segmenter.detectron2 import NORMS, RGB_MEAN, RGB_STD
from nightseg.segmenter.encoders import Norm
from nightseg.storage import Location, UserError
from nightseg.storage.yaml import parse_value

_MAX_BYTES: Final = 1_000_000
_MAX_BASES: Final = 10

_DEFAULTS: Final[dict[str, Any]] = {
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
}
# What the tensors say as well; where a config states another number, the checkpoint is not the config's.
_SIZES: Final = {
    "num_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "head_channels": "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "pyramid_channels": "MODEL.FPN.OUT_CHANNELS",
}
# What a Semantic FPN has to have; anything else is another network, whose weights may fit all the same.
_FIXED: Final[dict[str, tuple[Any, Any]]] = {  # key: detectron2's default, what is read here
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone"),
    "MODEL.RESNETS.NUM_GROUPS": (1, 1),
    "MODEL.RESNETS.WIDTH_PER_GROUP": (64, 64),
    "MODEL.RESNETS.RES5_DILATION": (1, 1),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64, 64),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4, [False] * 4),
    "MODEL.FPN.IN_FEATURES": ([], ["res2", "res3", "res4", "res5"]),
    "MODEL.FPN.NORM": ("", ""),
    "MODEL.FPN.FUSE_TYPE": ("sum", "sum"),
    "MODEL.SEM_SEG_HEAD.NAME": ("SemSegFPNHead", "SemSegFPNHead"),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": (["p2", "p3", "p4", "p5"], ["p2", "p3", "p4", "p5"]),
    "MODEL.SEM_SEG_HEAD.NORM": ("GN", "GN"),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (4, 4),
}
# No part of what a trained network computes or sees.
_WITHOUT_EFFECT: Final = (
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP"),
    *("INPUT.CROP", "INPUT.MASK_FORMAT", "MODEL.RESNETS.OUT_FEATURES", "MODEL.RESNETS.RES2_OUT_CHANNELS"),
    *("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS"),
)
_SECTIONS: Final = ("INPUT", "MODEL.BACKBONE", "MODEL.RESNETS", "MODEL.FPN", "MODEL.SEM_SEG_HEAD")
_YACS: Final = "give the config.yaml that detectron2 wrote beside the checkpoint"
_ARCHITECTURES: Final = ("PanopticFPN", "SemanticSegmentor")


class Detectron2Config(NamedTuple):
    """What the tensors of a checkpoint do not say. Mean and deviation are in [0, 255], in the order of `channels`."""

    channels: str  # RGB or BGR
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    stride_in_1x1: bool
    norm: Norm | None = None  # None: as the tensors look
    freeze_at: int = 0
    depth: int | None = None  # None: as the tensors look
    min_size_test: int = 800  # length of the shorter side that frames are resized to; 0 = frames keep their size
    max_size_test: int = 1333  # the most that the longer side may then have
    ignore_value: int = 255
    loss_weight: float = 1.0
    num_classes: int | None = None  # these three None: as the tensors look
    head_channels: int | None = None
    pyramid_channels: int | None = None

    @property
    def shortest_edge(self) -> list[int] | None:
        """As a model card says it."""
        return [self.min_size_test, self.max_size_test] if self.min_size_test else None


OURS: Final = Detectron2Config("RGB", RGB_MEAN, RGB_STD, stride_in_1x1=False, min_size_test=0)


def read_config(file: Location) -> Detectron2Config:
    """What a config.yaml says, also one with `_BASE_`.

    Raises UserError: no such file, not a config, a network that nightseg does not have.
    """
    config = _read(file)
    values = {key: _value(config, key, default) for key, default in _DEFAULTS.items()}
    where = str(file)
    kind = _value(config, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{where}: MODEL.META_ARCHITECTURE is {kind}", cure=f"only {' and '.join(_ARCHITECTURES)} can be converted"
        )
    for key, (default, wanted) in _FIXED.items():
        if (found := _value(config, key, default)) != wanted:
            raise UserError(
                f"{where}: {key} is {found!r}", cure=f"only networks built with {wanted!r} can be converted"
            )
    _check_keys(config, where)
    norms = {theirs: ours for ours, theirs in NORMS.items()} | {
        name: "sync" for name in ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
    }
    norm = values["MODEL.RESNETS.NORM"]
    if norm not in norms:
        raise UserError(
            f"{where}: MODEL.RESNETS.NORM is {norm!r}{closest(str(norm), norms)}", cure=f"known: {', '.join(norms)}"
        )
    stride, freeze_at = values["MODEL.RESNETS.STRIDE_IN_1X1"], values["MODEL.BACKBONE.FREEZE_AT"]
    if not isinstance(stride, bool) or not isinstance(freeze_at, int):
        raise UserError(
            f"{where}: MODEL.RESNETS.STRIDE_IN_1X1 {stride!r} or BACKBONE.FREEZE_AT {freeze_at!r} has a wrong type",
            cure="the first is true or false, the second a number",
        )
    depth = int(values["MODEL.RESNETS.DEPTH"])
    return check_input(
        Detectron2Config(
            str(values["INPUT.FORMAT"]),
            _three(where, "MODEL.PIXEL_MEAN", values["MODEL.PIXEL_MEAN"]),
            _three(where, "MODEL.PIXEL_STD", values["MODEL.PIXEL_STD"]),
            stride and depth >= 50,  # smaller ResNets have no such convolution, and detectron2 does not look
            norms[norm],
            max(0, min(5, freeze_at)),
            depth,
            values["INPUT.MIN_SIZE_TEST"],
            values["INPUT.MAX_SIZE_TEST"],
            values["MODEL.SEM_SEG_HEAD.IGNORE_VALUE"],
            values["MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"],
            **{name: _value(config, key, None) for name, key in _SIZES.items()},
        ),
        where,
    )


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a key that detectron2 does not have: a typing error, or a part that is computed elsewhere."""
    known = {*_DEFAULTS, *_FIXED, *_SIZES.values(), *_WITHOUT_EFFECT}
    for section in _SECTIONS:
        held = _value(config, section, {})
        for key in held if isinstance(held, dict) else [""]:
            if f"{section}.{key}" not in known:
                raise UserError(
                    f"{where}: {section}.{key} is no key of detectron2{closest(f'{section}.{key}', known)}",
                    cure="correct it, or take it out if nothing that the network computes or sees follows from it",
                )


def check_sizes(config: Detectron2Config, found: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless the tensors have the sizes that the config states: detectron2 then leaves them random."""
    for name, key in _SIZES.items():
        stated = getattr(config, name)
        if stated is not None and stated != found[name]:
            cure = "give the config that the checkpoint was trained with"
            raise UserError(f"{where}: {key} is {stated!r}, but the tensors are made for {found[name]}", cure=cure)


def check_input(config: Detectron2Config, where: str) -> Detectron2Config:
    """The config; UserError unless conv1 can be changed so that it takes RGB with ImageNet's mean and deviation."""
    if config.channels not in ("RGB", "BGR"):
        raise UserError(f"{where}: INPUT.FORMAT is {config.channels!r}", cure="RGB and BGR can be read")
    mean = config.pixel_mean if config.channels == "RGB" else config.pixel_mean[::-1]
    if any(abs(found - wanted) > 1e-3 for found, wanted in zip(mean, RGB_MEAN, strict=True)):
        raise UserError(
            f"{where}: PIXEL_MEAN is {list(config.pixel_mean)} ({config.channels}), not ImageNet's {list(RGB_MEAN)}; "
            "another mean cannot be moved into the first convolution exactly, because that pads with zeros",
            cure="only networks with ImageNet's mean can be converted"
            + ("; this one is of colours in [0, 1], detectron2's are bytes: times 255" if max(mean) <= 1 else ""),
        )
    if not all(std > 0 for std in config.pixel_std):
        raise UserError(f"{where}: PIXEL_STD is {list(config.pixel_std)}", cure="deviations are positive")
    least, most = config.min_size_test, config.max_size_test
    if not (_is_whole(least) and _is_whole(most) and least >= 0 and (most > 0 or least == 0)):
        raise UserError(
            f"{where}: INPUT.MIN_SIZE_TEST {least!r} and MAX_SIZE_TEST {most!r} give frames no size",
            cure="both are whole numbers above 0; MIN_SIZE_TEST 0 lets frames keep their size",
        )
    if not _is_whole(config.ignore_value) or not _is_number(config.loss_weight):
        raise UserError(
            f"{where}: SEM_SEG_HEAD.IGNORE_VALUE {config.ignore_value!r} or LOSS_WEIGHT {config.loss_weight!r} is no "
            "number",
            cure="give numbers",
        )
    return config


def config_text(config: Detectron2Config, architecture: Mapping[str, Any], num_classes: int) -> str:
    """A config for detectron2 that builds the SemanticSegmentor of this config; `read_config` reads it back."""
    depth = int(str(architecture["encoder"]).removeprefix("resnet"))
    norm: Norm = config.norm or "frozen"
    model = {
        "META_ARCHITECTURE": "SemanticSegmentor",
        "PIXEL_MEAN": list(config.pixel_mean),
        "PIXEL_STD": list(config.pixel_std),
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": config.freeze_at},
        "RESNETS": {
            "DEPTH": depth,
            "NORM": NORMS[norm],
            "STRIDE_IN_1X1": config.stride_in_1x1,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        },
        "FPN": {
            "IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "OUT_CHANNELS": architecture["pyramid_channels"],
        },
        "SEM_SEG_HEAD": {
            "NUM_CLASSES": num_classes,
            "CONVS_DIM": architecture["head_channels"],
            "NORM": "GN",
            "IGNORE_VALUE": config.ignore_value,
            "LOSS_WEIGHT": config.loss_weight,
        },
    }
    seen = {
        "FORMAT": config.channels,
        "MIN_SIZE_TEST": config.min_size_test,
        "MAX_SIZE_TEST": config.max_size_test,
    }
    return yaml.safe_dump({"VERSION": 2, "MODEL": model, "INPUT": seen}, sort_keys=False)


def _read(file: Location, depth: int = 0) -> dict[str, Any]:
    if depth > _MAX_BASES:
        raise UserError(
            f"{file}: more than {_MAX_BASES} configs refer to each other by _BASE_", cure="end the circle of _BASE_"
        )
    try:
        data = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{file}: there is no config file", cure="it lies beside detectron2's checkpoints as config.yaml"
        ) from error
    if len(data) > _MAX_BYTES:
        raise UserError(f"{file}: has {len(data)} bytes, a config has a few thousand", cure=_YACS)
    try:
        config = parse_value(data)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not plain YAML: {error}", cure=_YACS) from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a detectron2 config, which is a mapping with MODEL and INPUT", cure=_YACS)
    base = config.pop("_BASE_", None)
    if base is not None:
        whole = _read(_base(file, base), depth + 1)
        config = _merged(whole, config)
    if depth == 0 and not isinstance(config.get("MODEL"), dict):
        lazy = "LazyConfigs are not read; state the input and the stride by hand instead"
        raise UserError(f"{file}: not a detectron2 config, it has no MODEL", cure=lazy if "model" in config else _YACS)
    return dict(config)


def _base(file: Location, base: Any) -> Location:
    if not isinstance(base, str) or "://" in base:
        raise UserError(f"{file}: _BASE_ is {base!r}", cure="only files can be followed; give the config that was used")
    if base.startswith(("/", "~")) or not file.is_local:
        return Location.of(base)
    return Location.of(f"{file.parent.uri}/{base}")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _value(config: Mapping[str, Any], dotted: str, default: Any) -> Any:
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    if isinstance(value, str):
        try:  # detectron2 reads a text as Python where it is some: its configs write tuples so
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return list(value) if isinstance(value, tuple) else value


def _three(where: str, key: str, value: Any) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_number(number) for number in value):
        raise UserError(f"{where}: {key} is {value!r}", cure="give three numbers")
    return (float(value[0]), float(value[1]), float(value[2]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
