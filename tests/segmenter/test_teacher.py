"""What a teacher makes of a pool, with networks whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nightseg.cluster.train import LocalSession
from nightseg.data.class_list import taxonomy
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter.data import Batch, PoolBatch
from nightseg.segmenter.loss import segmentation_loss
from nightseg.segmenter.settings import Augmentation, Loss, Masked, Online, OnlineGuard, Teaching, Threshold, Training
from nightseg.segmenter.teacher import Teacher, boxes, half_of_the_classes, out_of_range
from nightseg.storage import Location

CLASSES = taxonomy("camvid11")
K = CLASSES.num_classes
SKY, ROAD, CAR = 0, 3, 8
SIZE = 32


class ReadsThePixels(nn.Module):
    """A network whose class is the red of a pixel, and whose confidence in it is its green / 256: in 4 x 4 blocks."""

    mean = (0.0, 0.0, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.body = self
        self.normalise = Normaliser((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # bytes as they are

    def forward(self, images_B3HW: Tensor) -> Tensor:
        red, green, _ = images_B3HW[:, :, ::4, ::4].unbind(1)
        p_true = green / 256
        rest = ((1 - p_true) / (K - 1))[:, None].expand(-1, K, -1, -1).clone()
        return rest.scatter_(1, red.long()[:, None], p_true[:, None]).log()


def picture(label_HW: Tensor, confidence: int = 250) -> Tensor:
    return torch.stack([label_HW, torch.full_like(label_HW, confidence), torch.full_like(label_HW, 7)]).to(torch.uint8)


def street() -> Tensor:
    """Sky above, road below, a car on it; borders lie on blocks, and far from where confidences are read."""
    label = torch.full((SIZE, SIZE), ROAD)
    label[:16] = SKY
    label[16:24, 8:24] = CAR
    return label


def teacher_of(session: LocalSession, **online: Any) -> Teacher:
    threshold = online.pop("threshold", Threshold(kind="fixed", confidence=0.5))
    never_below = online.pop("never_below", {})
    settings = {"mix": "none", "augmentation": Augmentation(), **online}
    teaching = Teaching(online=Online(**settings), threshold=threshold, never_below=never_below)
    return Teacher(ReadsThePixels(), teaching, Training(batch=2, ema_decay=0.9), 0, CLASSES)  # type: ignore[arg-type]


def pool_of(*labels: Tensor, confidence: int = 250) -> PoolBatch:
    weak = torch.stack([picture(label, confidence) for label in labels])
    return PoolBatch(weak, weak // 2, torch.zeros(len(labels), SIZE, SIZE, dtype=torch.bool))


@pytest.fixture
def session(tmp_path: Path) -> LocalSession:
    return LocalSession(Location.of(tmp_path))


@pytest.fixture
def batch() -> Batch:
    labels = torch.full((2, SIZE, SIZE), 5, dtype=torch.uint8)
    labels[:, :, :8] = 255
    labels[:, :4] = 6
    return Batch(torch.full((2, 3, SIZE, SIZE), 99, dtype=torch.uint8), labels)


def interior(label: Tensor) -> Tensor:
    """Pixels whose logits are of one class only: bilinear upsampling mixes those at borders."""
    wide = nn.functional.pad(label[None, None].float(), (4, 4, 4, 4), mode="replicate")
    most = nn.functional.max_pool2d(wide, 9, 1)
    least = -nn.functional.max_pool2d(-wide, 9, 1)
    return (most == least)[0, 0]


def test_the_labelled_batch_stays_and_the_pool_is_labelled(session: LocalSession, batch: Batch) -> None:
    label = street()
    found = teacher_of(session, weight=0.25).extend(batch, pool_of(label, label), 0, session)
    assert found.weights is not None
    assert torch.equal(found.images[:2], batch.images) and torch.equal(found.labels[:2], batch.labels)
    assert torch.equal(found.images[2:], pool_of(label, label).strong)  # the student's view
    sure = interior(label)
    assert sure.sum() > 300 and torch.equal(found.labels[2][sure].long(), label[sure])
    assert found.weights[:2].unique().tolist() == [1] and found.weights[2:].unique().tolist() == [0.25]


def test_padding_and_unsure_pixels_are_not_learned(session: LocalSession, batch: Batch) -> None:
    pool = pool_of(street())
    pool.padding[0, :, :5] = True
    pool.weak[0, 1, :, 16:] = 100
    found = teacher_of(session).extend(batch, pool, 0, session).labels[2]
    assert (found[:, :5] == 255).all() and (found[:, 20:] == 255).all()
    assert found[2, 8] == SKY and found[30, 8] == ROAD


def test_nothing_kept_gives_no_gradient(session: LocalSession, batch: Batch) -> None:
    found = teacher_of(session, masked=Masked()).extend(batch, pool_of(street(), confidence=60), 0, session)
    assert found.weights is not None and (found.labels[2:] == 255).all() and len(found.labels) == 4
    logits = torch.randn(4, K, 8, 8, requires_grad=True)
    loss = segmentation_loss(logits, found.labels, Loss(kind="combined"), pixel_weights_BHW=found.weights).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.count_nonzero(gradient[2:]) == 0 and torch.count_nonzero(gradient[:2]) > 0


def test_half_of_the_classes_are_pasted_with_their_label(session: LocalSession, batch: Batch) -> None:
    """The labelled frame has two classes and void: exactly one of the classes comes over, with image and label."""
    teacher = teacher_of(session, mix="classmix")
    pasted = set()
    for step in range(20):
        found = teacher.extend(batch, pool_of(street(), street()), step, session)
        for frame in (2, 3):
            is_pasted = found.images[frame, 0] == 99
            (which,) = {5, 6} & set(found.labels[frame].unique().tolist())
            assert torch.equal(is_pasted, batch.labels[0] == which)
            assert (found.labels[frame][is_pasted] == which).all()
            assert not (found.labels[frame][~is_pasted] == which).any()
            pasted.add((frame, which))
    assert pasted == {(2, 5), (2, 6), (3, 5), (3, 6)}  # by chance, for each frame


def test_the_smallest_draws_are_the_chosen_classes() -> None:
    label = torch.tensor([[[0, 1, 2], [3, 4, 255]]], dtype=torch.uint8)
    draws = torch.tensor([[0.5, 0.1, 0.9, 0.2, 0.3, 0.0]])  # class 5 is not there
    assert half_of_the_classes(label, draws).tolist() == [[[False, True, False], [True, True, False]]]  # 3 of 5
    assert not half_of_the_classes(torch.full((1, 2, 2), 255, dtype=torch.uint8), draws).any()


def test_boxes_have_the_drawn_share_and_lie_inside() -> None:
    draws = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    draws[0], draws[1] = torch.tensor([0.0, 0.5, 0, 0]), torch.tensor([1.0, 0.0, 0.999999, 0.999999])
    found = boxes(draws, 100, 60)
    assert found[0].nonzero()[0].tolist() == [0, 0] and found[1].nonzero()[-1].tolist() == [99, 59]
    for box, share in zip(found, 0.1 + 0.4 * draws[:, 0], strict=True):
        rows, columns = box.any(1), box.any(0)
        assert box.sum() == rows.sum() * columns.sum()  # one box
        # Two sides rounded by half a pixel each, of at least 100 * 0.1 ** 0.75 = 17 and 60 * 0.1 ** 0.75 = 10.
        assert box.float().mean().item() == pytest.approx(share.item(), rel=(1 + 0.5 / 17) * (1 + 0.5 / 10) - 1)


def test_squares_of_the_mean_colour_hide_the_frame_but_not_its_label(session: LocalSession, batch: Batch) -> None:
    teacher = teacher_of(session, masked=Masked(patch=8, ratio=0.5, weight=2.0), weight=0.5)
    pool = pool_of(street(), street())
    found = teacher.extend(batch, pool, 0, session)
    assert found.weights is not None and len(found.images) == 6
    assert torch.equal(found.labels[4:], found.labels[2:4]) and found.weights[4:].unique().tolist() == [1.0]
    hidden = (found.images[4:] == 0).all(dim=1) & (pool.strong != 0).any(dim=1)  # the mean colour is black here
    squares = hidden.view(2, 4, 8, 4, 8).transpose(2, 3).flatten(3)
    assert ((squares.all(-1)) | (~squares.any(-1))).all()
    assert 0.2 < squares.all(-1).float().mean() < 0.8 and not torch.equal(squares[0], squares[1])
    assert torch.equal(found.images[4:][:, 0][~hidden], pool.strong[:, 0][~hidden])


def test_thresholds_follow_the_running_counts(session: LocalSession, batch: Batch) -> None:
    """One class at one confidence a step. With a memory of 2 steps the older one counts half."""
    threshold = Threshold(kind="class_balanced", share=0.6, confidence=0.9, floor=0.2)
    teacher = teacher_of(session, threshold=threshold, memory=2)
    road = torch.full((SIZE, SIZE), ROAD)
    for step, (confidence, expected) in enumerate([(100, 100), (140, 140), (90, 90), (90, 90)]):
        # 60 % of 1 + 1/2 pixels are more than those of the last step alone where it is the surer one, but not of 1.
        teacher.extend(batch, pool_of(road, confidence=confidence), step, session)
        bar = teacher.record()["thresholds"]["road"]  # type: ignore[index]
        assert bar == pytest.approx(expected / 256, abs=1.5 / 256), step  # softmax of logarithms rounds
    assert bar < 100 / 256


def test_a_class_that_is_often_wrong_on_labelled_night_frames_is_not_kept(session: LocalSession) -> None:
    """On the labelled frame what the teacher calls road is road, what it calls car is something else."""
    threshold = Threshold(kind="class_balanced", confidence=0.9, share=1.0, precision=0.8)
    picture_of = torch.stack([picture(street()), picture(torch.full((SIZE, SIZE), CAR))])
    truth = torch.stack([street(), torch.full((SIZE, SIZE), 5)]).to(torch.uint8)
    labelled = Batch(picture_of, truth)
    trusting = teacher_of(session, threshold=threshold)
    found = trusting.extend(labelled, pool_of(street()), 0, session).labels[2]  # no frame of the batch is of the night
    assert (found == CAR).any() and (found == SKY).any()
    judging = teacher_of(session, threshold=threshold)
    judging._judged_2KN[:, ROAD, 250] = 5000
    found = judging.extend(labelled, pool_of(street()), 0, session, night=[0, 1]).labels[2]
    assert not (found == CAR).any() and (found == ROAD).any()


def test_a_share_out_of_range_by_hand() -> None:
    start = np.array([0.4, 0.4, 0.2, 0.0, 0.00005])
    assert out_of_range(start, start, (0.5, 1.5)).tolist() == [False] * 5
    assert out_of_range(np.array([0.19, 0.61, 0.2, 0.0, 0.0]), start, (0.5, 1.5)).tolist() == [True, True, *[False] * 3]
    # What was hardly there may vanish, and grow to 1.5 times the least share that counts, not further.
    grown = np.array([0.4, 0.4, 0.2, 0.00014, 0.00016])
    assert out_of_range(grown, start, (0.5, 1.5)).tolist() == [*[False] * 4, True]


def run_with_vanishing_cars(session: LocalSession, batch: Batch, act: str) -> tuple[Teacher, list[Batch]]:
    """25 steps with cars, then without; the counts forget them within some steps."""
    teacher = teacher_of(session, memory=4, guard=OnlineGuard(act=act, start_steps=4))  # type: ignore[arg-type]
    empty = street()
    empty[16:24, 8:24] = ROAD
    found = []
    for step in range(40):
        if teacher.teaches(step):
            few = street() if step < 12 or step % 10 == 9 else empty  # a car now and then: not learned if guarded
            found.append(teacher.extend(batch, pool_of(few), step, session))
    return teacher, found


def test_a_class_that_vanishes_is_told_once_and_not_learned(
    session: LocalSession, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, found = run_with_vanishing_cars(session, batch, "ignore")
    assert (found[8].labels[2:] == CAR).any() and not (found[39].labels[2:] == CAR).any()
    assert (found[39].labels[2:] == ROAD).any()
    (told,) = [message for message in caplog.messages if "teacher sees car" in message]
    assert "its pixels are not learned while it is so" in told and "of the pool" in told
    assert teacher.record()["warnings"] == [told]  # type: ignore[index]


def test_a_guard_can_only_warn_or_stop(session: LocalSession, batch: Batch, caplog: pytest.LogCaptureFixture) -> None:
    _, found = run_with_vanishing_cars(session, batch, "warn")
    assert len(found) == 40 and (found[39].labels[2:] == CAR).any()
    teacher, found = run_with_vanishing_cars(session, batch, "stop")
    assert not teacher.teaches(40) and len(found) == 20  # set anew every ten steps: in the 20th, and that is the end
    assert found[-1] is batch
    assert sum("teacher sees car" in message for message in caplog.messages) == 2


def test_what_is_never_below_is_not_learned_there(session: LocalSession, batch: Batch) -> None:
    puddle = street()
    puddle[24:32, :16] = SKY
    found = teacher_of(session, never_below={"sky": ["road"]}).extend(batch, pool_of(puddle), 0, session).labels[2]
    assert (found[:14] == SKY).all() and not (found[16:, :7] == SKY).any()
    assert (found[28:, 9:15] == SKY).all()  # below a car, which the rule does not name
    free = teacher_of(session).extend(batch, pool_of(puddle), 0, session).labels[2]
    assert (free[26:, :10] == SKY).all()


def test_views_are_averaged_where_they_belong(session: LocalSession) -> None:
    label = street()
    label[16:, :4] = 5  # not symmetric
    images = pool_of(label).weak
    plain, flipped = teacher_of(session), teacher_of(session, flip=True)
    labels, confidence = plain.label(images)
    assert torch.equal(labels[0][interior(label)], label[interior(label)])
    assert torch.equal(flipped.label(images)[0][0][interior(label)], label[interior(label)])
    torch.testing.assert_close(flipped.label(images)[1][0][interior(label)], confidence[0][interior(label)])
    scaled = teacher_of(session, scales=(1.0, 2.0)).label(images)[0][0]
    assert (scaled == label)[interior(label)].float().mean() > 0.9


def test_parts_have_labelled_frames_and_pool_alike(session: LocalSession, batch: Batch) -> None:
    teacher = teacher_of(session)
    teacher._training = Training(batch=2, accumulate=2, ema_decay=0.9)
    found = teacher.extend(batch, pool_of(street(), street()), 0, session)
    assert [int(image[0, 0, 0]) for image in found.images] == [99, 0, 99, 0]


def test_state_comes_back(session: LocalSession, batch: Batch) -> None:
    first, _ = run_with_vanishing_cars(session, batch, "ignore")
    second = teacher_of(session, memory=4, guard=OnlineGuard(start_steps=4))
    second.restore(first.state())
    assert second.record() == first.record() is not None
    pool = pool_of(street())
    one, other = (teacher.extend(batch, pool, 40, session) for teacher in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)
