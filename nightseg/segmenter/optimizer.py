"""Which rule moves which weights of a segmenter, and how fast: parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from nightseg.segmenter.settings import Training
from nightseg.storage import UserError

_STAGE: Final = re.compile(r".*?(?:layers?|blocks|stages?|levels?|denseblock|\.s)[._]?\d+")
_NEVER_DECAYED: Final = ("cls_token", "pos_embed", "reg_token", "dist_token")  # of transformers, as timm has it

WARMUP_START: Final = 1e-3  # detectron2's WARMUP_FACTOR


def build_optimizer(network: nn.Module, training: Training, encoder: nn.Module | None = None) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (whose betas are PyTorch's; `momentum` is not used).

    Weights of normalisations are not decayed (detectron2's WEIGHT_DECAY_NORM 0; decay pulls them towards values that
    mean nothing), biases of convolutions only with `decay_biases` (detectron2 does). Each group of parameters carries
    `rate`, what its learning rate is multiplied by: `encoder_rate` for the parameters of `encoder`, which is a part of
    `network`, less for its early stages by `layer_decay`, and `head_rate` for all others. The order of parameters is
    that of the network, so a saved state fits after a restart.
    """
    inside = stage_rates(encoder, training.layer_decay) if encoder is not None else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, is_decayed in _decayed(network, training.decay_biases):
        rate = training.encoder_rate * inside[id(parameter)] if id(parameter) in inside else training.head_rate
        groups.setdefault((rate, training.weight_decay if is_decayed else 0.0), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "rate": rate} for (rate, decay), parameters in groups.items()
    ]
    optimizer: torch.optim.Optimizer  # fused: one pass over the weights instead of one for each operation
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(described, lr=training.learning_rate, momentum=training.momentum, fused=True)
    else:
        optimizer = torch.optim.AdamW(described, lr=training.learning_rate, fused=True)
    set_learning_rate(optimizer, training.learning_rate)
    return optimizer


def stage_rates(encoder: nn.Module, decay: float) -> dict[int, float]:
    """Rate of each parameter (by its `id`) of an encoder: 1 in its last stage or block, `decay` times the next one's in
    each before, and in the stem, which comes before the first (as in BEiT, arXiv 2106.08254). What has no number of its
    own belongs to the stage before it; a transformer's rescaled maps to the last one.

    Raises UserError: a decay, and no stages are known of this encoder.
    """
    stage, order, depth = "", [""], {}
    for name, parameter in encoder.named_parameters():
        found = _STAGE.match(name)
        if found is not None and found.group() not in order:
            order.append(found.group())
        stage = found.group() if found is not None else stage
        depth[id(parameter)] = order.index(stage)
    if decay < 1 and len(order) == 1:
        raise UserError(
            "training.layer_decay: the stages of this encoder are not known by the names of its parameters",
            cure="leave it at 1, or use encoder_rate",
        )
    return {key: decay ** (len(order) - 1 - place) for key, place in depth.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """`learning_rate` for every group, multiplied by the group's own `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def learning_rate_of(training: Training, step: int, total_steps: int) -> float:
    """Of step 0 .. total_steps - 1: one warm-up, times one decay from `training.learning_rate`, no restarts.

    A pure function of the step, unlike torch's schedulers: a resumed training has no scheduler state to restore.
    """
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    share: float
    match training.decay:
        case "poly":  # DeepLab, arXiv 1606.00915, section 3: above 0 at the last step
            share = (1 - step / total_steps) ** training.poly_power
        case "step":  # detectron2's STEPS and GAMMA
            share = training.decay_factor ** sum(step >= round(at * total_steps) for at in training.decay_at)
        case "cosine":  # half of one: arXiv 1608.03983, equation 5, without restarts
            share = (1 + math.cos(math.pi * step / total_steps)) / 2
    return training.learning_rate * linear_warmup(step, training.warmup_steps) * share


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Factor that rises linearly from 0.001 at step 0 to 1 at `warmup_steps`, and stays 1."""
    if step >= warmup_steps:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * step / warmup_steps


def _decayed(network: nn.Module, decay_biases: bool) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter once, in the order of the network, and whether it is decayed."""
    seen: set[int] = set()
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        is_bias_decayed = decay_biases and "weight" in own and own["weight"].ndim > 1
        for name, parameter in own.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (
                    parameter,
                    name not in _NEVER_DECAYED and (parameter.ndim > 1 or (name == "bias" and is_bias_decayed)),
                )
