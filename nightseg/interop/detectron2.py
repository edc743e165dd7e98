"""Checkpoints of detectron2's Semantic FPN as model folders, and back.

Every tensor of a checkpoint is accounted for: taken over under our name, left out as belonging to another branch, or
an error. K classes.
"""

from __future__ import annotations

import colorsys
import io
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nightseg.data.class_list import taxonomy
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError, closest
from nightseg.interop.detectron2_config import (
    OURS,
    Detectron2Config,
    check_input,
    check_sizes,
    config_text,
    read_config,
)
from nightseg.interop.unpickle import unpickle_arrays
from nightseg.networks.model_folder import CARD, load_tensors, save_model
from nightseg.networks.weights import asked_of_torch, load_plain, refusal, the_network, unwrapped
from nightseg.segmenter.detectron2 import RGB_STD, their_name
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD
from nightseg.segmenter.network import build_semantic_fpn, network_of, num_groups
from nightseg.segmenter.predict import SHORTEST_EDGE
from nightseg.segmenter.settings import Network
from nightseg.storage import Location, sha256_of

CONV1: Final = "body.conv1.weight"
ORIGINAL_CONV1: Final = "original_conv1.safetensors"  # in a converted model's folder: the first convolution as it was
DETECTRON2_GROUPS: Final = 32
MOST_CLASSES: Final = 255  # and one more value, which is ignored

# Files of PyTorch are archives; before, they began with a pickled magic number (torch/serialization.py).
_OLD_TORCH: Final = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_STEM: Final = "backbone.bottom_up.stem."
# (blocks of stages res2 to res5, whether a block is a bottleneck): encoder
_BLOCKS: Final[dict[tuple[tuple[int, ...], bool], str]] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# The other branches of a PanopticFPN, and what older versions stored that follows from the config.
_OTHER: Final = re.compile(r"(proposal_generator|roi_heads|anchor_generator)\..*|pixel_mean|pixel_std")
_CHECKPOINT: Final = "give a checkpoint of detectron2's SemanticSegmentor or PanopticFPN on a ResNet"
_CONFIG: Final = "give the config that the checkpoint was trained with"
_GOLDEN_RATIO: Final = 0.618034


# -- model folders ----------------------------------------------------------------------------------------------------


def convert_from_detectron2(
    checkpoint: Location,
    out: Location,
    config: Location | Detectron2Config,
    *,
    classes: str | None = None,
    unfreeze: bool = False,
) -> dict[str, Any]:
    """Write the model folder `out` of a .pth or .pkl checkpoint; returns what was done with its tensors.

    `config`: detectron2's config.yaml, or what it says. `classes` is a taxonomy by name or file; without it the classes
    have numbers for names. `unfreeze`: let frozen batch norms learn from now on. Raises UserError, and then `out` is
    not touched: `out` is a model already, another number of classes, a config or checkpoint that is refused.
    """
    if isinstance(config, Detectron2Config):
        settings, config_sha256 = check_input(config, "the stated config"), None
    else:
        settings, config_sha256 = read_config(config), sha256_of(config.read_bytes())
    if (out / CARD).exists():
        raise UserError(f"{out}: is a model folder already", cure="give another folder, or delete it first")
    try:
        data = checkpoint.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{checkpoint}: there is no checkpoint", cure="give a .pth or .pkl file") from None
    found = from_detectron2(read_checkpoint(data, str(checkpoint)), settings, str(checkpoint), unfreeze=unfreeze)
    names = _classes(classes, found.architecture["num_classes"], checkpoint)
    settings = settings._replace(norm=found.architecture["norm"], depth=None)
    source = {"file": checkpoint.name, "bytes": len(data), "sha256": sha256_of(data), "left_out": found.left_out}
    if config_sha256 is not None:
        source["config_sha256"] = config_sha256
    card = {
        "kind": "semantic_fpn",
        **found.architecture,
        "taxonomy": {"name": names.name, "classes": list(names.classes), "palette": [list(c) for c in names.palette]},
        "input_size": None,
        SHORTEST_EDGE: settings.shortest_edge,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "start": "detectron2",
        "parents": [],
        "detectron2": {"config": settings._asdict(), "source": source},
    }
    if not torch.equal(unfold(found.tensors[CONV1], settings), found.conv1):
        (out / ORIGINAL_CONV1).write_bytes(safetensors.torch.save({CONV1: found.conv1}))
    save_model(out, found.tensors, card)
    return {
        "model": str(out),
        **found.architecture,
        "taxonomy": names.name,
        "input": f"{_described(settings)} in the checkpoint; folded into the first convolution",
        "frames": _frames(settings) + ("" if config_sha256 else "; not said by a config"),
        "ignored_class": names.classes[settings.ignore_value]
        if settings.ignore_value in range(names.num_classes)
        else None,
        "tensors": len(found.tensors),
        "left_out": found.left_out,
        "added": found.added,
        "sha256": source["sha256"],
    }


def convert_to_detectron2(folder: Location, out: Location) -> dict[str, Any]:
    """Write the checkpoint `out` (.pth) of a model folder, and beside it a config (.yaml) for a SemanticSegmentor.

    A model that came from detectron2 goes back to the input and, if it has not learned since, to the bits it had; any
    other takes RGB with ImageNet's mean and deviation. Raises UserError: not a ResNet, a head that detectron2 cannot
    build, or another file name.
    """
    if not out.name.endswith(".pth"):
        raise UserError(
            f"{out}: detectron2 knows its checkpoints by their ending", cure="use a name that ends with .pth"
        )
    tensors, card = load_tensors(folder)
    if card["kind"] != "semantic_fpn":
        raise UserError(f"{folder}: a model of kind {card['kind']!r}", cure="give a segmenter (kind semantic_fpn)")
    architecture = network_of(card).model_dump()
    known = card.get("detectron2", {}).get("config")  # a model that was trained here has none
    config = OURS
    if known is not None:
        lists = {key: tuple(known[key]) for key in ("pixel_mean", "pixel_std")}
        config = Detectron2Config(**{**known, **lists})
    config = config._replace(**{key: architecture[key] for key in ("norm", "freeze_at", "stride_in_1x1")})
    size = card["input_size"]
    least, most = (min(size), max(size)) if size else card.get(SHORTEST_EDGE) or (0, config.max_size_test)
    config = config._replace(min_size_test=least, max_size_test=most)
    original = folder / ORIGINAL_CONV1
    conv1 = safetensors.torch.load(original.read_bytes())[CONV1] if original.exists() else None
    theirs = to_detectron2(tensors, architecture, config, conv1, str(folder))
    buffer = io.BytesIO()
    torch.save({"model": theirs, "__author__": "nightseg"}, buffer)
    config_file = out.parent / f"{out.name.removesuffix('.pth')}.yaml"
    config_file.write_bytes(config_text(config, architecture, card["num_classes"]).encode())
    out.write_bytes(buffer.getbuffer())
    return {
        "checkpoint": str(out),
        "config": str(config_file),
        "input": _described(config),
        "frames": _frames(config)
        + (f"; here {size[0]} x {size[1]} whatever their shape, so others than these differ" if size else ""),
        "tensors": len(theirs),
        "classes": card["taxonomy"]["classes"],
    }


def _described(config: Detectron2Config) -> str:
    return f"{config.channels}, mean {config.pixel_mean}, deviation {config.pixel_std}"


def _frames(config: Detectron2Config) -> str:
    if config.shortest_edge is None:
        return "in their own size"
    return f"resized to a shorter side of {config.min_size_test}, a longer one of at most {config.max_size_test}"


def _classes(name: str | None, num_classes: int, checkpoint: Location) -> Taxonomy:
    if name is None:
        palette = tuple(_colour(index) for index in range(num_classes))
        return Taxonomy(f"numbers{num_classes}", tuple(f"class {index}" for index in range(num_classes)), palette, {})
    classes = taxonomy(name)
    if classes.num_classes != num_classes:
        raise UserError(
            f"{checkpoint}: predicts {num_classes} classes, the taxonomy {classes.name} has {classes.num_classes}",
            cure="give the taxonomy it was trained with, or none",
        )
    return classes


def _colour(index: int) -> tuple[int, int, int]:
    """Hues that keep apart, however many there are."""
    hue, saturation, value = index * _GOLDEN_RATIO % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index % 3) / 2
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


# -- tensors ---------------------------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """A checkpoint as ours. `architecture`: arguments of `build_semantic_fpn`."""

    tensors: dict[str, Tensor]
    architecture: dict[str, Any]
    conv1: Tensor  # as it was
    left_out: dict[str, int]  # tensors by the module they belong to
    added: int  # tensors that the file leaves to be understood


def read_checkpoint(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .pkl file of detectron2, `{"model": ...}` or bare, on the CPU.

    Raises UserError: damaged, code instead of data, or no dictionary of tensors.
    """
    if data.startswith(b"PK") or _OLD_TORCH in data[:16]:
        try:
            content = load_plain(data)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
            if asked := asked_of_torch(error):
                raise refusal(where, asked) from None
            raise UserError(
                f"{where}: not a PyTorch file of plain tensors, or damaged: {error}",
                cure="copy or download the file again",
            ) from error
    else:
        content = unpickle_arrays(data, where)
    if isinstance(content, dict) and "blobs" in content:
        raise UserError(f"{where}: is of Detectron1 or Caffe2 (it has 'blobs')", cure=_CHECKPOINT)
    # Beside `model` there may be an EMA of it; detectron2 itself loads `model`.
    named = isinstance(content, dict) and "model" in content
    model = content["model"] if named else the_network(content, where)
    if not isinstance(model, dict) or not model:
        what = f"holds {type(model).__name__}, not a dictionary of tensors or one under 'model'"
        raise UserError(f"{where}: {what}", cure=_CHECKPOINT)
    tensors = {}
    for name, value in model.items():
        if not isinstance(value, Tensor | np.ndarray | np.generic):
            raise UserError(f"{where}: {name!r} is {type(value).__name__}, not a tensor", cure=_CHECKPOINT)
        tensors[str(name)] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensors


def from_detectron2(
    checkpoint: Mapping[str, Tensor], config: Detectron2Config, where: str, *, unfreeze: bool = False
) -> Converted:
    """A SemanticSegmentor's or PanopticFPN's state dict as the tensors of a SemanticFPN that takes our input.

    `unfreeze`: frozen batch norms become trainable ones; only that training goes on differently follows from it.
    Raises UserError: another network, tensors too few or too many, of other shapes, not float32, not finite.
    """
    theirs = unwrapped(checkpoint, where)
    other = [name for name in theirs if _OTHER.fullmatch(name) or name.endswith(".cell_anchors")]
    theirs = {name: tensor for name, tensor in theirs.items() if name not in other}
    architecture, num_classes = _architecture(theirs, config, where)
    added = _add_statistics(theirs) if architecture["norm"] == "frozen" else _add_counts(theirs)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = build_semantic_fpn(Network(**architecture), num_classes).state_dict()
    _check(theirs, {their_name(name): tensor for name, tensor in wanted.items()}, where)
    tensors = {name: theirs[their_name(name)] for name in wanted}
    conv1, tensors[CONV1] = tensors[CONV1], fold(tensors[CONV1], config)
    if unfreeze and architecture["norm"] == "frozen":
        architecture["norm"] = "batch"
        counts = [name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name]
        tensors |= {name: torch.tensor(0) for name in counts}
    left_out = Counter(name.partition(".")[0] for name in other)
    return Converted(tensors, {**architecture, "num_classes": num_classes}, conv1, dict(left_out), added)


def fold(conv1: Tensor, config: Detectron2Config) -> Tensor:
    """The first convolution, for RGB in [0, 1] with ImageNet's mean and deviation instead of the config' input.

    That a channel is divided by another deviation is made up for by its weights; the means are the same, so the zeros
    that the convolution pads with mean the same, too. Rounded to float32 once.
    """
    order, factors = _channels(config)
    return _scaled(conv1[:, order], factors)


def unfold(conv1: Tensor, config: Detectron2Config) -> Tensor:
    """The inverse of `fold`, up to one rounding of the factors; exact where only the order of channels differs."""
    order, factors = _channels(config)
    return _scaled(conv1, [1 / factor for factor in factors])[:, [order.index(place) for place in range(3)]]


def _channels(config: Detectron2Config) -> tuple[list[int], list[float]]:
    """For red, green and blue: the place among the file's channels, and by how much its weights grow."""
    order = [0, 1, 2] if config.channels == "RGB" else [2, 1, 0]
    factors = [std / config.pixel_std[place] for place, std in zip(order, RGB_STD, strict=True)]
    return order, [1.0 if abs(factor - 1) < 1e-6 else factor for factor in factors]


def _scaled(conv1: Tensor, factors: list[float]) -> Tensor:
    if all(factor == 1 for factor in factors):
        return conv1.contiguous()
    return (conv1.double() * torch.tensor(factors, dtype=torch.float64).view(1, 3, 1, 1)).float().contiguous()


def _architecture(tensors: Mapping[str, Tensor], config: Detectron2Config, where: str) -> tuple[dict[str, Any], int]:
    for name in (f"{_STEM}conv1.weight", "backbone.fpn_lateral2.weight", "sem_seg_head.predictor.weight"):
        if name not in tensors:
            what = "an ImageNet backbone" if "stem.conv1.weight" in tensors else "a network without semantic branch"
            raise UserError(
                f"{where}: there is no {name}{closest(name, tensors)}; this looks like {what}", cure=_CHECKPOINT
            )
    stages = [_num_blocks(tensors, stage) for stage in range(2, 6)]
    is_bottleneck = "backbone.bottom_up.res2.0.conv3.weight" in tensors
    encoder = _BLOCKS.get((tuple(stages), is_bottleneck))
    if encoder is None:
        raise UserError(
            f"{where}: blocks {stages} of stages res2 to res5 are those of no ResNet 18, 34, 50, 101 or 152",
            cure=_CHECKPOINT,
        )
    if config.depth is not None and encoder != f"resnet{config.depth}":
        what = f"holds a {encoder}, but its config says MODEL.RESNETS.DEPTH {config.depth}"
        raise UserError(f"{where}: {what}", cure=_CONFIG)
    if config.stride_in_1x1 and not is_bottleneck:
        what = f"stride_in_1x1 was stated, but the blocks of {encoder} have no 1x1 convolution"
        raise UserError(f"{where}: {what}", cure=_CONFIG)
    counted = any(name.endswith(".num_batches_tracked") for name in tensors)
    if config.norm is not None and (config.norm != "frozen") != counted:
        found = "batch norms that were trained" if counted else "frozen batch norms"
        raise UserError(f"{where}: holds {found}, but its config says MODEL.RESNETS.NORM {config.norm}", cure=_CONFIG)
    num_classes = int(tensors["sem_seg_head.predictor.weight"].shape[0])
    if num_classes > MOST_CLASSES:
        raise UserError(
            f"{where}: predicts {num_classes} classes, and labels of one byte have {MOST_CLASSES}", cure=_CHECKPOINT
        )
    head_channels = tensors["sem_seg_head.p2.0.weight"].shape[0] if "sem_seg_head.p2.0.weight" in tensors else 0
    if head_channels % DETECTRON2_GROUPS:
        what = f"sem_seg_head.p2.0 has {head_channels} channels, which 32 groups cannot share"
        raise UserError(f"{where}: {what}", cure=_CHECKPOINT)
    pyramid_channels = int(tensors["backbone.fpn_lateral2.weight"].shape[0])
    sizes = {"num_classes": num_classes, "head_channels": head_channels, "pyramid_channels": pyramid_channels}
    check_sizes(config, sizes, where)
    return {
        "encoder": encoder,
        "pyramid_channels": pyramid_channels,
        "head_channels": head_channels or 128,
        "norm": config.norm or ("batch" if counted else "frozen"),
        "freeze_at": config.freeze_at,
        "stride_in_1x1": config.stride_in_1x1,
        "backend": "torchvision",
    }, num_classes


def _num_blocks(tensors: Iterable[str], stage: int) -> int:
    pattern = re.compile(rf"backbone\.bottom_up\.res{stage}\.(\d+)\.")
    return len({found[1] for name in tensors if (found := pattern.match(name))})


def _add_statistics(tensors: dict[str, Tensor]) -> int:
    """Files of MSRA's networks have norms without statistics: only a weight and a bias are meant to act."""
    bare = [
        name.removesuffix("bias")
        for name in tensors
        if name.startswith("backbone.bottom_up.") and name.endswith(".norm.bias")
    ]
    bare = [norm for norm in bare if f"{norm}running_mean" not in tensors and f"{norm}running_var" not in tensors]
    for norm in bare:
        still = torch.zeros_like(tensors[f"{norm}bias"])
        tensors |= {f"{norm}running_mean": still, f"{norm}running_var": still + (1 - 1e-5)}
    return 2 * len(bare)


def _add_counts(tensors: dict[str, Tensor]) -> int:
    """Older versions forgot how many batches a norm had seen when they froze its stage."""
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith(".norm.running_var")]
    bare = [f"{norm}num_batches_tracked" for norm in norms if f"{norm}num_batches_tracked" not in tensors]
    tensors |= {name: torch.tensor(0) for name in bare}
    return len(bare)


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    wrong += [f"{name} is not part of a Semantic FPN" for name in extra]
    if len(extra) == 1:
        wrong[-1] += closest(extra[0], wanted)
    for name in wanted.keys() & found.keys():
        tensor, like = found[name], wanted[name]
        if tensor.shape != like.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, it must be {tuple(like.shape)}")
        elif tensor.dtype != like.dtype:
            wrong.append(f"{name} is {tensor.dtype}, it must be {like.dtype}")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{where}: cannot be converted: {'; '.join(sorted(wrong)[:5])}{more}", cure=_CHECKPOINT)


def to_detectron2(
    tensors: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    config: Detectron2Config,
    conv1: Tensor | None,
    where: str,
) -> dict[str, Tensor]:
    """The state dict of detectron2's SemanticSegmentor that is fed as `config` say and computes the same.

    `conv1`: the first convolution of the checkpoint that these tensors came from; it is taken if it still is what was
    folded, so that a checkpoint comes back bit for bit. Raises UserError: detectron2 has no such network.
    """
    if architecture["encoder"] not in _BLOCKS.values():
        encoders = ", ".join(_BLOCKS.values())
        raise UserError(
            f"{where}: detectron2 has no {architecture['encoder']}",
            cure=f"train a model with network.encoder: {encoders}",
        )
    channels = architecture["head_channels"]
    if num_groups(channels) != DETECTRON2_GROUPS:
        raise UserError(
            f"{where}: its head has {channels} channels in {num_groups(channels)} groups, detectron2 has always 32",
            cure="train a model whose network.head_channels is a multiple of 32",
        )
    ours = {name: tensor.contiguous() for name, tensor in tensors.items()}
    unchanged = conv1 is not None and torch.equal(fold(conv1, config), ours[CONV1])
    ours[CONV1] = conv1 if conv1 is not None and unchanged else unfold(ours[CONV1], config)
    return {their_name(name): tensor for name, tensor in ours.items()}
