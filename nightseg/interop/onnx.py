"""A segmenter as one ONNX graph: the bytes of frames in, train ids and confidence out, at the frames' own size.

Resizing, normalisation, padding, upsampling and the argmax are inside, so whoever deploys it has nothing to get wrong.
Before the file is written the graph runs in onnxruntime, at several sizes, against the network it was made from.

B images, K classes, H x W pixels. Needs the extra `onnx`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.data.scenes import scene
from nightseg.networks.model_folder import TENSORS
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.network import SIZE_DIVISOR, upsample_logits
from nightseg.segmenter.predict import SHORTEST_EDGE, Segmenter, input_size
from nightseg.storage import Location, UserError, sha256_of

Output = Literal["labels", "logits"]
Size = tuple[int, int]

PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
MIN_AGREEMENT: Final = 0.999
"""Share of the pixels whose label must be the same: where two classes are equally likely, a rounding decides."""

_SMALLEST_SCENE = 32
_USUAL_SIZE = (128, 256)


class Check(NamedTuple):
    """The graph in onnxruntime on frames of one size."""

    batch: int
    height: int
    width: int
    max_abs_difference: float  # from the network in PyTorch: of the confidence, or of the logits over their largest
    label_agreement: float  # share of the pixels with the same label as that network gives
    segmenter_agreement: float  # the same against `nightseg.load_model`, which resizes in whole bytes


def export_onnx(
    model: Location, out: Location, *, size: Size | None = None, output: Output = "labels", tolerance: float = 1e-3
) -> dict[str, Any]:
    """Write the segmenter of a model folder as an ONNX file. Returns what it is, and every `Check`.

    The input `image` is uint8 (B, H, W, 3) RGB, as `nightseg.load_model` takes it; B, H and W are free, or H and W are
    `size`. Outputs: `labels` uint8 (B, H, W) and `confidence` float32 (B, H, W) in (0, 1]; or `logits` float32
    (B, K, H, W). The file's metadata hold taxonomy, classes, palette, mean and std (already applied inside); what is no
    text is JSON.

    Raises UserError: a package of the extra is missing, no segmenter, a name without .onnx. RuntimeError: PyTorch
    cannot export the network, or the graph differs from it by more than `tolerance`; then nothing is written.
    """
    _need_packages()
    if not out.name.endswith(".onnx"):
        raise UserError(f"{out.uri}: not the name of an ONNX file", cure="use a name that ends in .onnx")
    segmenter = Segmenter(model, "cpu")
    portable = PortableSegmenter(segmenter, output, size).eval()
    proto = _exported(portable, size)
    metadata = _metadata(segmenter, model, portable)
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    data = proto.SerializeToString()
    checks = check_graph(data, portable, segmenter, _check_sizes(segmenter.card["input_size"], size))
    _require_agreement(checks, tolerance, resizes=portable.input_size is not None)
    out.write_bytes(data)
    return {
        "model": str(model),
        "out": out.uri,
        "bytes": len(data),
        "opset": next(part.version for part in proto.opset_import if part.domain == ""),
        "input": metadata["input"],
        "outputs": metadata["outputs"],
        "tolerance": tolerance,
        "max_abs_difference": max(check.max_abs_difference for check in checks),
        "label_agreement": min(check.label_agreement for check in checks),
        "segmenter_agreement": min(check.segmenter_agreement for check in checks),
        "checks": [check._asdict() for check in checks],
    }


def _need_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX export: needs {', '.join(PACKAGES)}; not installed: {', '.join(missing)}",
            cure=f"pip install {' '.join(PACKAGES)} (or the extra `onnx` of nightseg)",
        )


# -- the graph -------------------------------------------------------------------------------------------------------


class PortableSegmenter(nn.Module):
    """What `Segmenter` does with whole frames, from bytes to labels, as one module that can be traced."""

    def __init__(self, segmenter: Segmenter, output: Output, size: Size | None) -> None:
        super().__init__()
        self.network = fixed_padding(copy.deepcopy(segmenter.network).to(memory_format=torch.contiguous_format))
        self.normalise = Normaliser(segmenter.card["mean"], segmenter.card["std"])
        self.output = output
        wanted = segmenter.card["input_size"]
        if segmenter.card.get(SHORTEST_EDGE):
            if size is None:
                raise UserError(
                    "ONNX export: this model sees frames in a size that follows from theirs (detectron2's "
                    "INPUT.MIN_SIZE_TEST), which a graph of any size cannot compute",
                    cure="fix the size of the frames",
                )
            wanted = input_size(segmenter.card, size)
        self.input_size = None if wanted is None or tuple(wanted) == size else tuple(wanted)

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, ...]:
        """uint8 RGB -> labels uint8 (B, H, W) and confidence float32 (B, H, W), or logits float32 (B, K, H, W)."""
        height, width = image_BHW3.shape[1:3]
        seen_B3HW = image_BHW3.permute(0, 3, 1, 2).float()
        if self.input_size is not None:
            seen_B3HW = F.interpolate(seen_B3HW, self.input_size, mode="bilinear", antialias=True)
        high, wide = seen_B3HW.shape[2:]
        # The network pads as well. Here it is written so that the tracer sees a multiple of 32, whatever the size is.
        below, right = _multiple(high) - high, _multiple(wide) - wide
        logits_BKhw = self.network(F.pad(self.normalise(seen_B3HW), (0, right, 0, below)))
        logits_BKHW = upsample_logits(logits_BKhw, high, wide)
        if self.input_size is not None:
            logits_BKHW = F.interpolate(logits_BKHW, (height, width), mode="bilinear", align_corners=False)
        if self.output == "logits":
            return (logits_BKHW,)
        highest_BHW, labels_BHW = logits_BKHW.max(dim=1)
        confidence_BHW = torch.exp(logits_BKHW - highest_BHW[:, None]).sum(dim=1).reciprocal()
        return labels_BHW.to(torch.uint8), confidence_BHW


def _multiple(length: int) -> int:
    return SIZE_DIVISOR * ((length + SIZE_DIVISOR - 1) // SIZE_DIVISOR)


class HalvingConvolution(nn.Module):
    """TensorFlow's "SAME" convolution of stride 2 on maps with even sides: its padding is k - 2, or 0, there."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        high, wide = (max(0, side - 2) for side in convolution.kernel_size)
        self.padding = (wide // 2, wide - wide // 2, high // 2, high - high // 2)

    def forward(self, maps_BChw: Tensor) -> Tensor:
        padded: Tensor = self.convolution._conv_forward(
            F.pad(maps_BChw, self.padding), self.convolution.weight, self.convolution.bias
        )
        return padded


def fixed_padding(network: nn.Module) -> nn.Module:
    """The network with padding that follows from no size, where the encoder is one of timm's TensorFlow ports.

    timm computes that padding from the sides of every map, which an exporter with free sizes traces for minutes into a
    graph of arithmetic. The sides are multiples of 32 at the input, so even wherever a convolution halves them.
    """
    try:
        from timm.layers import Conv2dSame
    except ImportError:
        return network
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv2dSame) and module.stride == (2, 2) and module.dilation == (1, 1):
            network.set_submodule(name, HalvingConvolution(module))
    return network


def _exported(portable: PortableSegmenter, size: Size | None) -> Any:
    """The ONNX model, checked by onnx itself, without the tracer's notes (they name files of this machine)."""
    import onnx

    free = torch.export.Dim
    batch = {0: free("batch")}
    shapes = batch if size is not None else batch | {1: free("height"), 2: free("width")}
    example = torch.zeros(2, *(size or (70, 90)), 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own internals
            program = torch.onnx.export(
                portable,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=["logits"] if portable.output == "logits" else ["labels", "confidence"],
                dynamic_shapes={"image_BHW3": shapes},
            )
    except torch.onnx.OnnxExporterError as error:
        cure = "" if size is not None else ". Cure: a fixed size of the frames may succeed"
        raise RuntimeError(f"PyTorch cannot export this network: {str(error).strip().splitlines()[0]}{cure}") from error
    assert program is not None
    proto = program.model_proto
    proto.doc_string = ""
    for part in [proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer]:
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
        part.ClearField("doc_string")
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(proto)
    return proto


def _metadata(segmenter: Segmenter, model: Location, portable: PortableSegmenter) -> dict[str, Any]:
    card, classes = segmenter.card, segmenter.taxonomy
    outputs = {
        "labels": "labels uint8 [batch, height, width] train ids; confidence float32 [batch, height, width] in (0, 1]",
        "logits": "logits float32 [batch, classes, height, width]",
    }
    return {
        "producer": f"nightseg {version('nightseg')}",
        "taxonomy": classes.name,
        "classes": list(classes.classes),
        "palette": [list(colour) for colour in classes.palette],
        "mean": list(card["mean"]),
        "std": list(card["std"]),
        "normalisation": "(image / 255 - mean) / std, inside the graph",
        "input_size": portable.input_size or card["input_size"],
        "resize": "inside the graph: antialiased bilinear" if portable.input_size else "none",
        "encoder": card["encoder"],
        "input": "image uint8 [batch, height, width, 3] RGB",
        "outputs": outputs[portable.output],
        "weights_sha256": sha256_of((model / TENSORS).read_bytes()),
    }


# -- the check -------------------------------------------------------------------------------------------------------


def _check_sizes(input_size: Sequence[int] | None, size: Size | None) -> list[tuple[int, Size]]:
    """Batches and sizes: the usual one, and odd ones that are no multiple of 32 or 4, smaller than a step of the
    padding, and longer than wide."""
    if size is not None:
        return [(1, size), (2, size)]
    high, wide = input_size or _USUAL_SIZE
    return [(1, (high, wide)), (2, (high + 1, wide - 3)), (1, (33, 31)), (1, (77, 45))]


def check_graph(
    data: bytes, portable: PortableSegmenter, segmenter: Segmenter, sizes: Sequence[tuple[int, Size]]
) -> list[Check]:
    """Run the graph in onnxruntime on street scenes by day and by night, beside PyTorch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [_check(session, portable, segmenter, batch, size) for batch, size in sizes]


def _check(session: Any, portable: PortableSegmenter, segmenter: Segmenter, batch: int, size: Size) -> Check:
    images = [_street(number, *size) for number in range(batch)]
    image_BHW3 = np.stack(images)
    found = session.run(None, {"image": image_BHW3})
    with torch.inference_mode():
        wanted = [part.numpy() for part in portable(torch.from_numpy(image_BHW3))]
    values, wanted_values = found[-1], wanted[-1]
    labels, wanted_labels = _labels(found), _labels(wanted)
    theirs = np.stack([segmented.labels for segmented in segmenter.batch(images)])
    return Check(
        batch,
        *size,
        max_abs_difference=float(np.abs(values - wanted_values).max() / max(1.0, np.abs(wanted_values).max())),
        label_agreement=float((labels == wanted_labels).mean()),
        segmenter_agreement=float((labels == theirs).mean()),
    )


def _labels(outputs: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return outputs[0] if len(outputs) > 1 else outputs[0].argmax(axis=1)


def _street(number: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    domain = ("day", "night")[number % 2]
    whole = scene(0, number, domain, max(height, _SMALLEST_SCENE), max(width, _SMALLEST_SCENE)).image
    return np.ascontiguousarray(whole[:height, :width])


def _require_agreement(checks: Sequence[Check], tolerance: float, *, resizes: bool) -> None:
    for check in checks:
        # A graph that resizes is near `load_model`, which does it in whole bytes; how near is reported, not required.
        agreement = check.label_agreement if resizes else min(check.label_agreement, check.segmenter_agreement)
        # Not `>`: a graph that answers NaN must not pass.
        if not (check.max_abs_difference <= tolerance and agreement >= MIN_AGREEMENT):
            raise RuntimeError(
                f"the graph differs from the network: on {check.batch} frames of {check.height} x {check.width} by "
                f"{check.max_abs_difference:.2g} (tolerance {tolerance:.2g}), with {agreement:.2%} of the labels equal "
                f"(at least {MIN_AGREEMENT:.1%}). No file is written. Cure: another version of onnxruntime or torch; "
                "or a larger tolerance, if this is good enough"
            )
