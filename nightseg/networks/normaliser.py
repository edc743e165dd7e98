"""Bytes to the numbers an encoder was trained on, with constants that stay on the device.

B images, 3 colour channels (RGB), H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normaliser(nn.Module):
    """Its constants move to a GPU with the module, so a pass copies nothing small there and waits for nothing; and an
    exported graph carries them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """RGB in [0, 255], uint8 or float, to float32, channels last: (image / 255 - mean) / std."""
        bytes_B3HW = images_B3HW.to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(self.shift, bytes_B3HW, self.scale)
