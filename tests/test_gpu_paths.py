"""What a GPU would refuse or wait for, seen without one: tensors on two devices, and steps that read numbers back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nightseg.cluster.train import LocalSession
from nightseg.data.class_list import taxonomy
from nightseg.networks.ema import ema_of, update_ema
from nightseg.segmenter import teacher as teaching
from nightseg.segmenter.data import Batch, PoolBatch
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn
from nightseg.segmenter.optimizer import build_optimizer
from nightseg.segmenter.predict import Segmenter, classify, classify_at_stride
from nightseg.segmenter.settings import Augmentation, Inference, Loss, Masked, Network, Online, Teaching, Training
from nightseg.segmenter.train import Learner, average_statistics, training_step
from nightseg.selection.features import Extractor, Identity
from nightseg.storage import Location
from nightseg.unit import loss as unit
from nightseg.unit.network import LatentNoise, to_uint8, to_unit_range
from nightseg.unit.perceptual import build_perceptual
from nightseg.unit.settings import LossWeights, Translator
from nightseg.unit.train import _precision
from tests.fake_gpu import CUDA, META, fake_cuda, meta_gpu

CLASSES = taxonomy("camvid11")
SIZE = (64, 96)
SMALL = {"pyramid_channels": 8, "head_channels": 8}
ENCODERS = ["efficientnet_lite0", "resnet18"]


def network_on(device: torch.device, encoder: str = "resnet18", **changes: Any) -> SemanticFPN:
    network = build_semantic_fpn(Network(encoder=encoder, **SMALL | changes), CLASSES.num_classes)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def batch_on(device: torch.device, frames: int = 4) -> Batch:
    """Read on the CPU as ever, then moved."""
    images = torch.zeros(frames, 3, *SIZE, dtype=torch.uint8)
    return Batch(images, torch.zeros(frames, *SIZE, dtype=torch.uint8)).to(device)


def places(tensors: Any) -> set[str]:
    return {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Without counters of steps: those of optimisers that are not fused belong on the CPU."""
    return [value for one in optimizer.state.values() for value in one.values() if value.ndim]


class Together(LocalSession):
    """One of two workers. NCCL adds up what is on the device; anything else would be moved back and forth."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(Location.of(folder), device)
        self.world_size, self.sums = 2, 0

    def sum(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == self.device.type
        self.sums += 1
        return tensor + tensor


# -- the fakes themselves: a test of devices that cannot fail would be worth nothing -----------------------------------


@pytest.mark.parametrize(("fake", "device"), [(fake_cuda, CUDA), (meta_gpu, META)])
def test_the_fakes_refuse_two_devices_and_read_backs(fake: Any, device: torch.device) -> None:
    with fake():
        network = nn.Conv2d(3, 4, 1).to(device)
        here, there = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8).to(device)
        assert network(there).device.type == device.type
        for mixed in (lambda: network(here), lambda: here + there, lambda: torch.where(there > 0, here, there)):
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        for read in (
            lambda: there.sum().item(),
            lambda: bool(there.sum() > 0),
            lambda: there[there > 0].sum().tolist(),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()


def test_autocast_of_a_fake_gpu_is_that_of_a_gpu() -> None:
    with fake_cuda():
        network, images = nn.Conv2d(3, 4, 1).to(CUDA), torch.zeros(1, 3, 8, 8, device=CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            assert network(images).dtype == torch.bfloat16


# -- segmenter ---------------------------------------------------------------------------------------------------------

LOSSES = {
    "cross-entropy": Loss(kind="cross_entropy"),
    "combined": Loss(kind="combined", alpha=0.3, gamma=1.5),
    "chunks": Loss(kind="focal", loss_chunk_rows=16),
    "hard share": Loss(kind="cross_entropy", ohem={"share": 0.25}),
    "hard, chunks": Loss(kind="combined", ohem={"confidence": 0.7, "min_kept": 100}, loss_chunk_rows=16),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("optimizer", "encoder"), [("sgd", "resnet18"), ("adamw", "efficientnet_lite0")])
def test_a_step_of_a_segmenter_stays_on_the_device_and_reads_nothing(
    tmp_path: Path, loss: str, weighted: bool, optimizer: Any, encoder: str
) -> None:
    training = Training(batch=4, accumulate=2, clip_norm=1.0, optimizer=optimizer)
    with meta_gpu():
        network = network_on(META, encoder)
        rule = build_optimizer(network, training, encoder=network.body)
        batch, session = batch_on(META), Together(tmp_path, META)
        if weighted:
            batch = batch._replace(weights=torch.ones(4, *SIZE).to(META))
        metrics = training_step(
            network.train(), rule, network.normalise, batch, LOSSES[loss], training,
            class_weights=[1.0] * CLASSES.num_classes if weighted else None,
            world_size=2, sum_over_workers=session.sum,
        )  # fmt: skip
        learner = Learner(network, rule, ema_of(network), torch.zeros(3, 2, device=META))
        learner.note(metrics)
        update_ema(learner.evaluated, network, 0.9)
        average_statistics(network, session)
        assert session.sums == 2
        assert places(metrics) == places(network.state_dict().values()) == {"meta"}
        assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
        assert moments_of(rule) and places(moments_of(rule)) == {"meta"}


@pytest.mark.parametrize("mix", ["classmix", "cutmix", "none"])
def test_a_step_with_a_teacher_waits_only_when_thresholds_are_due(tmp_path: Path, mix: Any) -> None:
    training = Training(batch=4, accumulate=2, ema_decay=0.9)
    online = Online(
        mix=mix, augmentation=Augmentation(), masked=Masked(), scales=(1.0, 0.5), flip=True, precision="bfloat16"
    )
    with meta_gpu():
        network, session = network_on(META), Together(tmp_path, META)
        rules = {"car": ["sky"]}
        teacher = teaching.Teacher(ema_of(network), Teaching(online=online, never_below=rules), training, 0, CLASSES)
        pool = PoolBatch(*(torch.zeros(4, 3, *SIZE, dtype=torch.uint8) for _ in range(2)), torch.zeros(4, *SIZE) > 1)
        teacher.taught = teaching.STEPS_BETWEEN_BARS  # the next step sets no bars
        batch = teacher.extend(batch_on(META), pool.to(META), 7, session, night=[0, 2])
        assert places(batch) == {"meta"} and len(batch.images) == 12
        rule = build_optimizer(network, training, encoder=network.body)
        training_step(network.train(), rule, network.normalise, batch, Loss(), training)
        assert all(parameter.grad is not None for parameter in network.parameters())
        teacher.taught = 2 * teaching.STEPS_BETWEEN_BARS - 1
        with pytest.raises(NotImplementedError, match="meta tensor"):  # here bars are due: they are computed by the CPU
            teacher.extend(batch_on(META), pool.to(META), 8, session)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_comes_back_to_the_device(optimizer: Any) -> None:
    training = Training(batch=4, optimizer=optimizer)

    def learner_on(device: torch.device) -> Learner:
        network = network_on(device)
        return Learner(
            network,
            build_optimizer(network, training, encoder=network.body),
            None,
            torch.zeros(3, 2, device=device),
        )

    with fake_cuda():
        before = learner_on(torch.device("cpu"))
        for parameter in before.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before.optimizer.step()
        state = before.state()
        after = learner_on(CUDA)
        after.restore(state)
        assert places(after.network.state_dict().values()) == places([after.metrics]) == {"cuda"}
        assert places(value for one in after.optimizer.state.values() for value in one.values()) == {"cuda"}
        for parameter in after.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        after.optimizer.step()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "inference",
    [Inference(), Inference(flip=True, scales=(0.5, 1.0), window=(32, 48), precision="bfloat16")],
    ids=["whole", "tiles, flips, scales"],
)
def test_prediction_reads_back_its_results_alone(encoder: str, inference: Inference) -> None:
    with fake_cuda():
        segmenter = segmenter_on_a_fake_gpu(encoder, inference)
        assert inference.precision == "float32" or logits_of(segmenter).dtype == torch.bfloat16
        images = [np.zeros((*SIZE, 3), np.uint8), np.zeros((50, 70, 3), np.uint8)]
        for image, seen in zip(images, segmenter._passes(images), strict=True):
            labels_HW, sure_HW = classify(seen, image.shape[:2])
            assert labels_HW.shape == sure_HW.shape == image.shape[:2]
            labels_hw, sure_hw, _ = classify_at_stride(seen)
            found = (labels_HW, sure_HW, labels_hw, sure_hw)
            assert places(found) == {"cuda"}
            assert [part.dtype for part in found] == [torch.uint8, torch.float32] * 2


def logits_of(segmenter: Segmenter) -> Tensor:
    (seen,) = segmenter._passes([np.zeros((*SIZE, 3), np.uint8)])
    return seen[0].tiles[0].logits


def segmenter_on_a_fake_gpu(encoder: str, inference: Inference) -> Segmenter:
    """As `Segmenter` is made, but for the model folder: fakes have no numbers that a file could hold."""
    segmenter = Segmenter.__new__(Segmenter)
    segmenter.device, segmenter.inference = CUDA, inference
    segmenter.card = {"input_size": None, "taxonomy": {"name": "c", "classes": [], "palette": []}}
    segmenter._network = network_on(CUDA, encoder).eval().requires_grad_(False)
    segmenter._normalise = segmenter._network.normalise
    return segmenter


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_are_made_on_the_device(precision: str) -> None:
    with fake_cuda():
        network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        identity = Identity("small", 8, "clean", "0" * 64, Location.of("/weights"))
        extractor = Extractor(identity, network, 32, CUDA, mean=(0.4, 0.5, 0.6))
        maps = extractor._maps(torch.zeros(4, 3, 32, 32), precision)
        assert maps.device.type == "cuda" and maps.dtype == torch.float32 and maps.shape == (4, 8, 15, 15)


# -- UNIT --------------------------------------------------------------------------------------------------------------

TINY = Translator(
    day="d", night="n", width=8, res_blocks=2, shared_blocks=1, discriminator_width=4, crop=(64, 96), batch=2
)


@contextlib.contextmanager
def noise_without_a_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A generator of random numbers on a GPU needs one."""
    monkeypatch.setattr(torch, "Generator", lambda device: torch._C.Generator("cpu"))
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, device: real(*shape, device=device))
    yield


@pytest.mark.parametrize("adversarial", ["least_squares", "cross_entropy"])
@pytest.mark.parametrize("perceptual", [0.0, 0.5])
def test_a_step_of_unit_stays_on_the_device_and_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, adversarial: Any, perceptual: float
) -> None:
    settings = TINY.model_copy(
        update={"adversarial_loss": adversarial, "weights": LossWeights(perceptual=perceptual), "precision": "float32"}
    )
    features = None
    if perceptual:
        features = build_perceptual("efficientnet_lite0").to(META, memory_format=torch.channels_last)
    with meta_gpu(), noise_without_a_generator(monkeypatch):
        networks = unit.build_networks(settings, 0, META)
        precision, means = _precision(settings, META), unit.TermMeans(META)
        crops = [to_unit_range(torch.zeros(2, 3, 64, 96, dtype=torch.uint8).to(META)) for _ in range(2)]
        noise = unit.latent_noise(0, 3, [0, 1], (32, 16, 24), META)
        translation = networks.generators(*crops, noise, settings.weights.needs_cycle)
        given = (*crops, translation, settings, precision)
        means.add(
            unit.discriminator_step(networks, networks.discriminators, *given),
            unit.generator_step(networks, networks.discriminators, features, *given),
        )
        update_ema(networks.ema, networks.generators, 0.9)
        for module in (networks.generators, networks.discriminators):
            assert all(parameter.grad is not None for parameter in module.parameters())
        state = [*networks.generators.state_dict().values(), *networks.ema.state_dict().values(), means.sums]
        assert places(state) == {"meta"}
        assert places(moments_of(networks.generator_optimizer)) == {"meta"}


@pytest.mark.parametrize("tile", [None, (64, 80)])
def test_a_translation_is_made_on_the_device_in_bfloat16(tile: tuple[int, int] | None) -> None:
    with fake_cuda():
        generators = unit.build_networks(TINY, 0, CUDA).generators
        images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8).to(CUDA)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            made = to_uint8(generators.translate(to_unit_range(images), "night", tile))
        assert made.device.type == "cuda" and made.dtype == torch.uint8 and made.shape == images.shape


def test_a_generator_step_in_bfloat16_has_losses_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(), noise_without_a_generator(monkeypatch):
        networks = unit.build_networks(TINY, 0, CUDA)
        precision = _precision(TINY, CUDA)
        crops = [to_unit_range(torch.zeros(2, 3, 64, 96, dtype=torch.uint8).to(CUDA)) for _ in range(2)]
        noise = LatentNoise(*(torch.zeros(2, 32, 16, 24, device=CUDA) for _ in range(4)))
        with precision:
            translation = networks.generators(*crops, noise, True)
            assert translation.night_from_day.dtype == torch.bfloat16
            losses = unit.generator_loss(
                networks.discriminators, None, *crops, translation, LossWeights(perceptual=0.0), unit.least_squares
            )
        assert {term.dtype for term in losses} == {torch.float32} and places(losses) == {"cuda"}
