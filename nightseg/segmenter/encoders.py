"""Image encoders: ResNet 18 to 152, EfficientNet-Lite 0 to 2, and timm's, as four maps at strides 4, 8, 16 and 32.

B images, 3 colour channels (RGB), C channels, H x W pixels, h x w pixels of a map. Each encoder carries the mean and
the standard deviation its ImageNet weights were trained with: normalisation belongs to the weights, not to the recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from nightseg.errors import closest
from nightseg.segmenter.settings import ENCODERS, LITE_ENCODERS, RESNETS
from nightseg.storage import UserError

# torchvision's IMAGENET1K weights were trained on images in [0, 1] normalised with these.
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
# EfficientNet-Lite was trained on (byte - 127) / 128. On street frames its classifier is surer with that than with
# IMAGENET_MEAN and IMAGENET_STD (entropy 4.17 against 4.43 nats).
LITE_MEAN: Final = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Final = (128 / 255, 128 / 255, 128 / 255)

STRIDES: Final = (4, 8, 16, 32)
TIMM: Final = "timm/"
LITES: Final = {
    name: f"tf_{name}" for name in LITE_ENCODERS
}  # of timm; TensorFlow "SAME" padding, as the weights expect
PATCH: Final = 16  # pixels of a frame that become a token of a plain transformer
_PROBE_SIZE: Final = (64, 96)  # divisible by 32, not square, and no size that a network is usually built for

Norm = Literal["batch", "frozen", "sync"]


class ResNetEncoder(nn.Module):
    """torchvision's ResNet without its classifier; parameter names are torchvision's (conv1, bn1, layer1 .. layer4).

    `stride_in_1x1` (resnet50 and deeper): stages 3 to 5 halve the size in the first 1x1 convolution, as the ResNets of
    MSRA and detectron2's model zoo do, instead of in the 3x3 convolution. Weights of either kind fit both.
    """

    def __init__(self, name: str, *, stride_in_1x1: bool = False) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(name, weights=None)
        self.name = name
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        deepest = resnet.fc.in_features
        self.channels: tuple[int, ...] = (deepest // 8, deepest // 4, deepest // 2, deepest)
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD
        if stride_in_1x1:
            for layer in (self.layer2, self.layer3, self.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)

    def freeze(self, stages: int) -> None:
        """So many first stages cannot learn any more: 1 is the stem, 2 also layer1, ... (detectron2's FREEZE_AT)."""
        parts = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
        freeze(self, *(name for part in parts[:stages] for name in part))

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images_B3HW))))
        level2 = self.layer1(stem)
        level3 = self.layer2(level2)
        level4 = self.layer3(level3)
        return [level2, level3, level4, self.layer4(level4)]


class TimmEncoder(nn.Module):
    """A network of timm without its classifier.

    Parameter names are timm's own, below `features.`; mean and deviation those it records, for images in [0, 1].
    """

    def __init__(
        self,
        name: str,
        model: str,
        levels: tuple[int, ...],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        import timm  # two seconds to import, paid only by who asks for such an encoder

        self.name = name
        self.features = timm.create_model(model, pretrained=False, features_only=True, out_indices=levels)
        self.channels: tuple[int, ...] = tuple(self.features.feature_info.channels())
        known = self.features.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(mean or known["mean"])
        self.std: tuple[float, ...] = tuple(std or known["std"])

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        return list(self.features(images_B3HW))


class TransformerEncoder(nn.Module):
    """A plain transformer of timm (ViT, DINOv2, DINOv3, EVA02), whose maps all have one stride, as a pyramid.

    Four depths, rescaled to the four strides as in BEiT (arXiv 2106.08254) and ViTDet (arXiv 2203.16527): `rescale` is
    not among timm's weights. Images are scaled so that a patch is 16 pixels of them, whatever it is for the network.
    """

    def __init__(self, name: str, model: str, levels: tuple[int, ...]) -> None:
        super().__init__()
        import timm

        self.name = name
        self.features = timm.create_model(
            model, pretrained=False, features_only=True, out_indices=levels, dynamic_img_size=True
        )
        self.patch = int(self.features.feature_info.reduction()[0])
        width = int(self.features.feature_info.channels()[0])
        self.channels: tuple[int, ...] = (width,) * len(STRIDES)
        self.mean: tuple[float, ...] = tuple(self.features.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(self.features.pretrained_cfg["std"])
        twice = [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GroupNorm(1, width), nn.GELU()]
        finest = nn.Sequential(*twice, nn.ConvTranspose2d(width, width, 2, stride=2))
        finer = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.rescale = nn.ModuleList([finest, finer, nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        size = [side // PATCH * self.patch for side in images_B3HW.shape[-2:]]
        if self.patch != PATCH:
            images_B3HW = F.interpolate(images_B3HW, size, mode="bilinear", align_corners=False)
        maps = self.features(images_B3HW)
        return [rescale(map_BChw) for rescale, map_BChw in zip(self.rescale, maps, strict=True)]


Encoder = ResNetEncoder | TimmEncoder | TransformerEncoder


def build_encoder(name: str, *, norm: Norm = "batch", freeze_at: int = 0, stride_in_1x1: bool = False) -> Encoder:
    """An encoder with random weights; `imagenet_weights` gives the tensors to load into it.

    `name`: one of ENCODERS, or timm/NAME[.TAG], whose tag says which of timm's weights are meant. `norm`: see
    `choose_norm`. `freeze_at` and `stride_in_1x1` are for ResNets: see `ResNetEncoder`. Raises UserError: unknown name,
    a network of timm without the four maps, or a norm that it does not have.
    """
    encoder: Encoder
    if name in RESNETS:
        encoder = ResNetEncoder(name, stride_in_1x1=stride_in_1x1)
    elif name in LITES:
        encoder = TimmEncoder(name, LITES[name], (1, 2, 3, 4), LITE_MEAN, LITE_STD)
    elif name.startswith(TIMM):
        kind, levels = _timm_levels(name.removeprefix(TIMM))
        encoder = kind(name, name.removeprefix(TIMM), levels)
    else:
        raise unknown_encoder(name)
    choose_norm(encoder, norm, name)
    if isinstance(encoder, ResNetEncoder):
        encoder.freeze(freeze_at)
    return encoder


def unknown_encoder(name: str) -> UserError:
    return UserError(
        f"network.encoder: unknown encoder {name!r}{closest(name, ENCODERS)}",
        cure=f"choose one of {', '.join(ENCODERS)}, {TIMM}NAME",
    )


@functools.cache
def _timm_levels(model: str) -> tuple[type[TimmEncoder | TransformerEncoder], tuple[int, ...]]:
    """Which of timm's feature maps have strides 4, 8, 16, 32; looked up, then measured on tensors without content.

    Of a plain transformer, whose maps all have the stride of its patches: four depths, the last one among them.
    """
    import timm

    if not timm.is_model(model):
        near = closest(model.partition(".")[0], timm.list_models())
        raise UserError(
            f"network.encoder: timm has no network {model!r}{near}", cure="choose one of timm.list_models()"
        )
    with _explained(model), torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = timm.create_model(model, pretrained=False, features_only=True)
        strides = [int(entry["reduction"]) for entry in network.feature_info.info]
    kind: type[TimmEncoder | TransformerEncoder] = TimmEncoder
    if len(strides) >= len(STRIDES) and len(set(strides)) == 1:
        kind = TransformerEncoder
        levels = tuple(len(strides) * number // len(STRIDES) - 1 for number in range(1, len(STRIDES) + 1))
    elif missing := [stride for stride in STRIDES if stride not in strides]:
        raise UserError(
            f"network.encoder: {TIMM}{model} has feature maps at strides {', '.join(map(str, strides))}; a Semantic "
            f"FPN needs {', '.join(map(str, STRIDES))}, and it has no {', '.join(map(str, missing))}",
            cure="choose a network with a pyramid of maps (ResNet, RegNet, ConvNeXt, EfficientNet) or a plain "
            "transformer (ViT, DINOv2, EVA02)",
        )
    else:
        levels = tuple(max(index for index, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES)
    height, width = _PROBE_SIZE
    with _explained(model), torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        encoder = kind(TIMM + model, model, levels).eval()
        shapes = [tuple(maps.shape) for maps in encoder(torch.zeros(1, 3, height, width))]
        wanted_shapes = [(1, c, height // s, width // s) for c, s in zip(encoder.channels, STRIDES, strict=True)]
        if shapes != wanted_shapes:
            raise ValueError(f"the maps of a {height} x {width} image are {shapes}, not {wanted_shapes}")
    return kind, levels


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """timm's networks raise a dozen types of error for what they cannot do."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"network.encoder: {TIMM}{model} cannot be an encoder of frames of any size, timm says: {error}",
            cure="choose another network",
        ) from error


# -- batch norms ------------------------------------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics, weight and bias are buffers: no optimiser, no `train()` and no batch changes them.

    The numbers and names of a batch norm in evaluation mode. torchvision's keeps its input for the backward pass, and
    not the count of batches (`num_batches_tracked`) that a norm has which was trained before, as in detectron2.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, counted: bool = False) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0) if counted else None)

    def forward(self, maps_BChw: Tensor) -> Tensor:
        mean_C, variance_C = self.get_buffer("running_mean"), self.get_buffer("running_var")
        weight_C, bias_C = self.get_buffer("weight"), self.get_buffer("bias")
        if not maps_BChw.requires_grad:
            return F.batch_norm(maps_BChw, mean_C, variance_C, weight_C, bias_C, training=False, eps=self.eps)
        # batch_norm would keep its whole input for the gradient of weights that have none
        scale_C = weight_C * (variance_C + self.eps).rsqrt()
        shift_C = bias_C - mean_C * scale_C
        scale, shift = (vector_C.view(1, -1, 1, 1).to(maps_BChw.dtype) for vector_C in (scale_C, shift_C))
        return torch.addcmul(shift, maps_BChw, scale)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Reads what a batch norm wrote, and the other way round."""
        count = prefix + "num_batches_tracked"
        if self._buffers["num_batches_tracked"] is None:
            state_dict.pop(count, None)
        else:
            state_dict.setdefault(count, torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def freeze(parent: nn.Module, *names: str) -> None:
    """Nothing in these children can learn any more: parameters get no gradient, batch norms are frozen."""
    for name in names:
        parent.get_submodule(name).requires_grad_(False)
        _freeze_norms(parent, name, counted=True)


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Batch norms keep their statistics, weight and bias for now. Call again after every `.train()`.

    For a training that leaves them alone; an encoder that never trains them has `norm: frozen`.
    """
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def choose_norm(encoder: nn.Module, norm: Norm, name: str) -> None:
    """Turn the batch norms of an encoder, in place, into the wanted kind; its `name` is for messages.

    batch: statistics of each worker's own batch. sync: of the batches of all workers, which need GPUs. frozen: those
    of the weights stay. Raises UserError where frozen or sync has nothing to act on.
    """
    kinds = {type(module) for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)}
    if norm == "batch":
        return
    if not kinds:
        raise UserError(f"network.norm: it is {norm!r}, but {name} has no batch norm", cure="leave it at batch")
    if kinds != {nn.BatchNorm2d}:  # of timm, which also hold the activation that follows
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        (freeze_batch_norm_2d if norm == "frozen" else convert_sync_batchnorm)(encoder)
    elif norm == "frozen":
        for child, _ in list(encoder.named_children()):
            _freeze_norms(encoder, child, counted=False)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(encoder)  # type: ignore[no-untyped-call]


def _freeze_norms(parent: nn.Module, name: str, *, counted: bool) -> None:
    child = parent.get_submodule(name)
    if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
        frozen = FrozenBatchNorm2d(child.num_features, child.eps, counted=counted)
        frozen.load_state_dict(dict(child.state_dict()))
        parent.add_module(name, frozen)
    for below, _ in list(child.named_children()):
        _freeze_norms(child, below, counted=counted)
