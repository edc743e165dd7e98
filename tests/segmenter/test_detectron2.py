"""Beside an installed detectron2: its SemanticSegmentor and ours give the same logits at any size, whoever computes.

Skipped where detectron2 is not installed; what it computed once is in the golden files, which other tests read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nightseg.interop.detectron2 import from_detectron2, read_checkpoint, to_detectron2
from nightseg.interop.detectron2_config import OURS, config_text, read_config
from nightseg.segmenter import detectron2
from nightseg.segmenter.encoders import Norm
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn, open_semantic_fpn, upsample_logits
from nightseg.segmenter.settings import Network
from nightseg.storage import Location

pytest.importorskip("detectron2")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own dependencies

SIZES = [(97, 161), (120, 200), (64, 96)]
SMALL = Network(encoder="resnet18", pyramid_channels=8, head_channels=8)
BACKENDS = ("torchvision", "detectron2")
Draw = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def theirs_and_ours(draw: Draw, encoder: str, **settings: Any) -> tuple[Any, SemanticFPN]:
    """detectron2's own network with drawn weights, and ours with the same ones, converted."""
    network = Network(encoder=encoder, **{"norm": "frozen", **settings})
    segmentor = detectron2.semantic_segmentor(network, num_classes=19).eval()
    tensors = draw(segmentor.state_dict())
    segmentor.load_state_dict(tensors)
    facts = OURS._replace(stride_in_1x1=settings.get("stride_in_1x1", False), norm=settings.get("norm", "frozen"))
    found = from_detectron2(tensors, facts, "here")
    return segmentor, open_semantic_fpn(found.tensors, found.architecture)


@pytest.mark.parametrize(
    ("encoder", "stride_in_1x1"), [("resnet50", False), ("resnet50", True), ("resnet101", False), ("resnet101", True)]
)
def test_logits_at_odd_sizes(drawn_as_golden: Draw, encoder: str, stride_in_1x1: bool) -> None:
    segmentor, ours = theirs_and_ours(drawn_as_golden, encoder, stride_in_1x1=stride_in_1x1)
    for height, width in SIZES:
        generator = torch.Generator().manual_seed(height)
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = segmentor([{"image": image[0]}])[0]["sem_seg"]
            logits = upsample_logits(ours(ours.normalise(image)), height, width)[0]
        difference = float((logits - expected).abs().max())
        print(f"{encoder} stride_in_1x1={stride_in_1x1} {height}x{width}: {difference:.2e}")
        assert logits.shape == expected.shape == (19, height, width)
        assert difference <= 1e-4


@pytest.mark.parametrize("encoder", ["resnet18", "resnet34", "resnet152"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_the_other_depths_have_the_same_tensors(drawn_as_golden: Draw, encoder: str, norm: Norm) -> None:
    segmentor, ours = theirs_and_ours(drawn_as_golden, encoder, norm=norm)
    assert sorted(segmentor.state_dict()) == sorted(map(detectron2.their_name, ours.state_dict()))


@pytest.mark.parametrize(("norm", "freeze_at"), [("frozen", 2), ("batch", 0), ("batch", 2), ("sync", 1)])
def test_its_modules_are_a_drop_in(norm: Norm, freeze_at: int) -> None:
    settings = SMALL.model_copy(update={"norm": norm, "freeze_at": freeze_at})
    torch.manual_seed(0)
    ours, theirs = (build_semantic_fpn(settings.model_copy(update={"backend": backend}), 3) for backend in BACKENDS)
    assert list(theirs.state_dict()) != [] and set(theirs.state_dict()) == set(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())  # with the note of versions that PyTorch adds
    theirs.load_state_dict(dict(ours.state_dict()))
    back = theirs.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    assert theirs.body.mean == ours.body.mean and theirs.body.channels == ours.body.channels
    frozen = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == sum(
        p.numel() for name, p in ours.named_parameters() if name in frozen
    )
    image = torch.rand(2, 3, 70, 50)
    for network in (ours, theirs):
        network.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), ours(image), atol=1e-5, rtol=1e-5)
    assert set(copy.deepcopy(theirs).state_dict()) == set(back)


def test_both_learn_alike() -> None:
    torch.manual_seed(0)
    settings = SMALL.model_copy(update={"freeze_at": 1})
    ours, theirs = (build_semantic_fpn(settings.model_copy(update={"backend": backend}), 3) for backend in BACKENDS)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64)
    for network in (ours, theirs):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        network.train()
        for _ in range(3):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
    after = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-4)


def test_detectron2_loads_what_was_written_for_it(
    tmp_path: Path, detectron2_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    for encoder, norm, stride in (("resnet18", "frozen", False), ("resnet50", "batch", True)):
        facts = OURS._replace(stride_in_1x1=stride, norm=norm, freeze_at=2)  # type: ignore[arg-type]
        tensors = detectron2_tensors(encoder, norm=norm, freeze_at=2)
        found = from_detectron2(tensors, facts, "here")
        theirs = to_detectron2(found.tensors, found.architecture, facts, None, "here")
        torch.save({"model": theirs}, tmp_path / "out.pth")
        (tmp_path / "out.yaml").write_text(config_text(facts, found.architecture, 3))
        settings = get_cfg()
        settings.merge_from_file(str(tmp_path / "out.yaml"))
        settings.MODEL.DEVICE = "cpu"
        model = build_model(settings)
        assert type(model).__name__ == "SemanticSegmentor"
        model.load_state_dict(theirs, strict=True)
        DetectionCheckpointer(model).load(str(tmp_path / "out.pth"))
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_panoptic_fpn_as_its_trainer_saves_it(tmp_path: Path, drawn_as_golden: Draw) -> None:
    """Made by detectron2's default config (BGR bytes, stride in 1x1), saved with optimiser and schedule, converted."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer

    settings = get_cfg()
    settings.MODEL.META_ARCHITECTURE = "PanopticFPN"
    settings.MODEL.DEVICE = "cpu"
    settings.MODEL.MASK_ON = True
    settings.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    settings.MODEL.RESNETS.OUT_FEATURES = settings.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    settings.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    settings.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    settings.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    settings.MODEL.ROI_BOX_HEAD.NAME, settings.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    settings.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    settings.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    settings.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 19
    model = build_model(settings).eval()
    tensors = drawn_as_golden(model.state_dict())
    stem = "backbone.bottom_up.stem.conv1.weight"
    tensors[stem] = tensors[stem] / 58  # fed with bytes
    model.load_state_dict(tensors)
    optimizer = build_optimizer(settings, model)
    trained = {"optimizer": optimizer, "scheduler": build_lr_scheduler(settings, optimizer)}
    DetectionCheckpointer(model, str(tmp_path), **trained).save("model_final", iteration=9)
    (tmp_path / "config.yaml").write_text(settings.dump())

    where = str(tmp_path / "model_final.pth")
    facts = read_config(Location.of(tmp_path / "config.yaml"))
    found = from_detectron2(read_checkpoint(Path(where).read_bytes(), where), facts, where)
    assert set(found.left_out) == {"proposal_generator", "roi_heads"}
    assert (found.architecture["stride_in_1x1"], found.architecture["freeze_at"]) == (True, 2)
    ours = open_semantic_fpn(found.tensors, found.architecture)
    height, width = SIZES[0]
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = (image[0].flip(0).float() - model.pixel_mean) / model.pixel_std
        padded = torch.nn.functional.pad(pixels[None], (0, -width % 32, 0, -height % 32))
        expected = model.sem_seg_head(model.backbone(padded))[0][0, :, :height, :width]
        logits = upsample_logits(ours(ours.normalise(image)), height, width)[0]
    difference = float((logits - expected).abs().max())
    print(f"PanopticFPN, folded, {height}x{width}: {difference:.2e}")
    assert difference <= 1e-4
