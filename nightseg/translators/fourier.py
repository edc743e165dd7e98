"""FDA: the style of a frame is its low-frequency amplitudes, what it shows is the phase (arXiv 2004.05498, eq. 3).

No training. HW3: height, width, bands.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def swap_low_amplitudes(image_HW3: Pixels, lender_HW3: Pixels, beta: float) -> Pixels:
    """The image with the lender's amplitudes at all frequencies below `beta` cycles a pixel in both directions.

    That is |u| < beta H and |v| < beta W in cycles a frame, band by band: beta 0 swaps nothing, any other at least the
    mean. A lender of another size is resized first (antialiased bilinear). Values that leave [0, 255] are clipped.
    """
    height, width = image_HW3.shape[:2]
    rows, columns = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    low_Uv = (np.abs(rows) < beta)[:, None] & (columns < beta)[None, :]
    if not low_Uv.any():
        return image_HW3.copy()
    lender_HW3 = _resized(lender_HW3, height, width)
    made = np.empty_like(image_HW3)
    for band in range(image_HW3.shape[2]):
        spectrum_Uv = np.fft.rfft2(image_HW3[..., band].astype(np.float32))
        wanted = np.abs(np.fft.rfft2(lender_HW3[..., band].astype(np.float32))[low_Uv])
        mine = spectrum_Uv[low_Uv]
        size = np.abs(mine)
        # A frequency that the image lacks has no phase; the cosine is as good as any.
        direction = np.divide(mine, size, out=np.ones_like(mine), where=size > 0)
        spectrum_Uv[low_Uv] = wanted * direction
        plane_HW = np.fft.irfft2(spectrum_Uv, s=(height, width))
        made[..., band] = np.rint(np.clip(plane_HW, 0, 255))
    return made


def _resized(image_HW3: Pixels, height: int, width: int) -> Pixels:
    if image_HW3.shape[:2] == (height, width):
        return image_HW3
    picture = Image.fromarray(image_HW3).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)
