"""What the recipe's types know about translators: settings known by a name, and words that they allow.

What a recipe says itself counts more than its preset.

    thesis  the translator of the thesis, as its published code sets it (LTSP, doi 10.1016/j.imavis.2024.105257): UNIT's
            network of 2018 with layer norm in the discriminators and perceptual loss, 330,000 iterations
    paper   the day to night settings of UNIT's first code (arXiv 1703.00848): ten times the weights, cross-entropy, a
            shared block, no perceptual loss, a constant learning rate, 640 x 480 crops; on the network of 2018
    small   what two CPU cores finish in minutes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TRANSLATORS: Final[Mapping[str, Mapping[str, Any]]] = {
    "thesis": {
        "width": 64,
        "res_blocks": 4,
        "shared_blocks": 0,
        "discriminator_width": 64,
        "discriminator_scales": 3,
        "discriminator_norm": "layer",
        "adversarial_loss": "least_squares",
        "weights": {
            "adversarial": 1.0,
            "reconstruction": 10.0,
            "kl": 0.01,
            "cycle": 10.0,
            "cycle_kl": 0.01,
            "perceptual": 1.0,
            "discriminator": 1.0,
        },
        "perceptual_network": "vgg16",
        "iterations": 330_000,
        "batch": 1,
        "short_side": 512,
        "crop": (256, 256),
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "step_every": 100_000,
        "average": 0.0,
        "checkpoint_every": 10_000,
        "samples_every": 10_000,
    },
    "paper": {
        "width": 64,
        "res_blocks": 4,
        "shared_blocks": 1,
        "discriminator_width": 64,
        "discriminator_scales": 3,
        "discriminator_norm": "none",
        "adversarial_loss": "cross_entropy",
        "weights": {
            "adversarial": 10.0,
            "reconstruction": 100.0,
            "kl": 0.1,
            "cycle": 100.0,
            "cycle_kl": 0.1,
            "perceptual": 0.0,
            "discriminator": 10.0,
        },
        "iterations": 500_000,
        "batch": 1,
        "short_side": 490,  # 0.68 of frames of 1280 x 720
        "crop": (480, 640),
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "step_every": 500_000,
        "average": 0.0,
        "checkpoint_every": 5_000,
        "samples_every": 2_500,
    },
    "small": {
        "width": 16,
        "res_blocks": 2,
        "shared_blocks": 0,
        "discriminator_width": 32,
        "discriminator_scales": 2,
        "discriminator_norm": "layer",
        "adversarial_loss": "least_squares",
        "weights": {
            "adversarial": 2.0,
            "reconstruction": 5.0,
            "kl": 0.01,
            "cycle": 5.0,
            "cycle_kl": 0.01,
            "perceptual": 0.1,
            "discriminator": 1.0,
        },
        "perceptual_network": "efficientnet_lite0",
        "iterations": 400,
        "batch": 2,
        "short_side": 240,
        "crop": (128, 128),
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "step_every": 240,
        "average": 0.98,
        "checkpoint_every": 100,
        "samples_every": 100,
    },
}


PERCEPTUAL_LAYERS: Final[Mapping[str, tuple[str, ...]]] = {
    "vgg16": tuple(
        f"relu{block}_{layer}" for block, depth in enumerate((2, 2, 3, 3, 3), 1) for layer in range(1, depth + 1)
    ),
    "efficientnet_lite0": tuple(f"stride_{stride}" for stride in (2, 4, 8, 16, 32)),
}


def completed(settings: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings with everything that their `preset` says and they do not, mappings in them key by key.

    Settings without a preset, or with one that is not known, stay as they are.
    """
    name = settings.get("preset")
    preset = known.get(name, {}) if isinstance(name, str) else {}
    return _over(preset, settings)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
