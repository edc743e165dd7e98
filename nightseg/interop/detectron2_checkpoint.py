"""The tensors of a Semantic FPN, from detectron2's checkpoints and back.

Every tensor of a checkpoint is accounted for: taken over under our name, left out as belonging to another branch, or
an error. K classes.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nightseg.errors import UserError, closest
from nightseg.interop.detectron2_config import Facts
from nightseg.interop.unpickle import unpickle_arrays
from nightseg.networks.weights import asked_of_torch, refusal
from nightseg.segmenter.detectron2 import RGB_STD, their_name
from nightseg.segmenter.network import build_semantic_fpn, num_groups

CONV1: Final = "body.conv1.weight"
DETECTRON2_GROUPS: Final = 32

# Files of PyTorch are archives; before, they began with a pickled magic number (torch/serialization.py).
_OLD_TORCH: Final = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

_STEM: Final = "backbone.bottom_up.stem."
_BLOCKS: Final[
    dict[tuple[tuple[int, ...], bool], str]
] = {  # blocks of stages res2 to res5, and whether a block is a bottleneck
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# The other branches of a PanopticFPN, and what older versions stored that follows from the config.
_OTHER: Final = re.compile(r"(proposal_generator|roi_heads|anchor_generator)\..*|pixel_mean|pixel_std")


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
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
            if asked := asked_of_torch(error):
                raise refusal(where, asked) from None
            raise UserError(f"{where} is not a PyTorch file of plain tensors, or is damaged: {error}") from error
    else:
        content = unpickle_arrays(data, where)
    if isinstance(content, dict) and "blobs" in content:
        raise UserError(f"{where} is of Detectron1 or Caffe2 (it has 'blobs'); only detectron2's own files are read")
    model = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(model, dict) or not model:
        raise UserError(f"{where} holds {type(model).__name__}, not a dictionary of tensors or one under 'model'")
    tensors = {}
    for name, value in model.items():
        if not isinstance(value, Tensor | np.ndarray | np.generic):
            raise UserError(f"{where}: {name!r} is {type(value).__name__}, not a tensor")
        tensors[str(name)] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensors


# -- from detectron2 --------------------------------------------------------------------------------------------------


def from_detectron2(checkpoint: Mapping[str, Tensor], facts: Facts, where: str, *, unfreeze: bool = False) -> Converted:
    """A SemanticSegmentor's or PanopticFPN's state dict as the tensors of a SemanticFPN that takes our input.

    `unfreeze`: frozen batch norms become trainable ones; only that training goes on differently follows from it.
    Raises UserError: another network, tensors too few or too many, of other shapes, not float32, not finite.
    """
    theirs = _without_prefix(checkpoint)
    other = [name for name in theirs if _OTHER.fullmatch(name) or name.endswith(".cell_anchors")]
    theirs = {name: tensor for name, tensor in theirs.items() if name not in other}
    architecture, num_classes = _architecture(theirs, facts, where)
    added = _add_statistics(theirs) if architecture["norm"] == "frozen" else _add_counts(theirs)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = build_semantic_fpn(**architecture, num_classes=num_classes).state_dict()
    _check(theirs, {their_name(name): tensor for name, tensor in wanted.items()}, where)
    tensors = {name: theirs[their_name(name)] for name in wanted}
    conv1, tensors[CONV1] = tensors[CONV1], fold(tensors[CONV1], facts)
    if unfreeze and architecture["norm"] == "frozen":
        architecture["norm"] = "batch"
        counts = [name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name]
        tensors |= {name: torch.tensor(0) for name in counts}
    left_out = Counter(name.partition(".")[0] for name in other)
    return Converted(tensors, {**architecture, "num_classes": num_classes}, conv1, dict(left_out), added)


def fold(conv1: Tensor, facts: Facts) -> Tensor:
    """The first convolution, for RGB in [0, 1] with ImageNet's mean and deviation instead of the facts' input.

    That a channel is divided by another deviation is made up for by its weights; the means are the same, so the zeros
    that the convolution pads with mean the same, too. Rounded to float32 once.
    """
    order, factors = _channels(facts)
    return _scaled(conv1[:, order], factors)


def unfold(conv1: Tensor, facts: Facts) -> Tensor:
    """The inverse of `fold`, up to one rounding of the factors; exact where only the order of channels differs."""
    order, factors = _channels(facts)
    return _scaled(conv1, [1 / factor for factor in factors])[:, [order.index(place) for place in range(3)]]


def _channels(facts: Facts) -> tuple[list[int], list[float]]:
    """For red, green and blue: the place among the file's channels, and by how much its weights grow."""
    order = [0, 1, 2] if facts.channels == "RGB" else [2, 1, 0]
    factors = [std / facts.pixel_std[place] for place, std in zip(order, RGB_STD, strict=True)]
    return order, [1.0 if abs(factor - 1) < 1e-6 else factor for factor in factors]


def _scaled(conv1: Tensor, factors: list[float]) -> Tensor:
    if all(factor == 1 for factor in factors):
        return conv1.contiguous()
    return (conv1.double() * torch.tensor(factors, dtype=torch.float64).view(1, 3, 1, 1)).float().contiguous()


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."  # of a network that was wrapped for several workers
    wrapped = all(name.startswith(prefix) for name in tensors)
    return {name.removeprefix(prefix) if wrapped else name: tensor for name, tensor in tensors.items()}


def _architecture(tensors: Mapping[str, Tensor], facts: Facts, where: str) -> tuple[dict[str, Any], int]:
    for name in (f"{_STEM}conv1.weight", "backbone.fpn_lateral2.weight", "sem_seg_head.predictor.weight"):
        if name not in tensors:
            what = "an ImageNet backbone" if "stem.conv1.weight" in tensors else "a network without semantic branch"
            raise UserError(
                f"{where}: there is no {name}{closest(name, tensors)}; this looks like {what}. Needed is a checkpoint "
                "of detectron2's SemanticSegmentor or PanopticFPN"
            )
    stages = [_num_blocks(tensors, stage) for stage in range(2, 6)]
    is_bottleneck = "backbone.bottom_up.res2.0.conv3.weight" in tensors
    encoder = _BLOCKS.get((tuple(stages), is_bottleneck))
    if encoder is None:
        raise UserError(
            f"{where}: blocks {stages} of stages res2 to res5 are those of no ResNet 18, 34, 50, 101 or 152"
        )
    if facts.depth is not None and encoder != f"resnet{facts.depth}":
        raise UserError(f"{where} holds a {encoder}, but its config says MODEL.RESNETS.DEPTH {facts.depth}")
    if facts.stride_in_1x1 and not is_bottleneck:
        raise UserError(f"{where}: stride_in_1x1 was stated, but the blocks of {encoder} have no 1x1 convolution")
    counted = any(name.endswith(".num_batches_tracked") for name in tensors)
    if facts.norm is not None and (facts.norm != "frozen") != counted:
        found = "batch norms that were trained" if counted else "frozen batch norms"
        raise UserError(f"{where} holds {found}, but its config says MODEL.RESNETS.NORM {facts.norm}")
    head_channels = tensors["sem_seg_head.p2.0.weight"].shape[0] if "sem_seg_head.p2.0.weight" in tensors else 0
    if head_channels % DETECTRON2_GROUPS:
        raise UserError(f"{where}: sem_seg_head.p2.0 has {head_channels} channels, which 32 groups cannot share")
    return {
        "encoder": encoder,
        "pyramid_channels": int(tensors["backbone.fpn_lateral2.weight"].shape[0]),
        "head_channels": head_channels or 128,
        "norm": facts.norm or ("batch" if counted else "frozen"),
        "freeze_at": facts.freeze_at,
        "stride_in_1x1": facts.stride_in_1x1,
        "backend": "torchvision",
    }, int(tensors["sem_seg_head.predictor.weight"].shape[0])


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
        raise UserError(f"{where} cannot be converted: {'; '.join(sorted(wrong)[:5])}{more}")


# -- back -------------------------------------------------------------------------------------------------------------


def to_detectron2(
    tensors: Mapping[str, Tensor], architecture: Mapping[str, Any], facts: Facts, conv1: Tensor | None, where: str
) -> dict[str, Tensor]:
    """The state dict of detectron2's SemanticSegmentor that is fed as `facts` say and computes the same.

    `conv1`: the first convolution of the checkpoint that these tensors came from; it is taken if it still is what was
    folded, so that a checkpoint comes back bit for bit. Raises UserError: detectron2 has no such network.
    """
    if architecture["encoder"] not in _BLOCKS.values():
        raise UserError(f"{where}: detectron2 has no {architecture['encoder']}; it has {', '.join(_BLOCKS.values())}")
    if num_groups(architecture["head_channels"]) != DETECTRON2_GROUPS:
        raise UserError(
            f"{where}: its head has {architecture['head_channels']} channels in "
            f"{num_groups(architecture['head_channels'])} groups; detectron2 has {DETECTRON2_GROUPS} groups always, so "
            "network.head_channels must be a multiple of 32"
        )
    ours = {name: tensor.contiguous() for name, tensor in tensors.items()}
    unchanged = conv1 is not None and torch.equal(fold(conv1, facts), ours[CONV1])
    ours[CONV1] = conv1 if conv1 is not None and unchanged else unfold(ours[CONV1], facts)
    return {their_name(name): tensor for name, tensor in ours.items()}
