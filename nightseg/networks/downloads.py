"""Nothing is fetched unless somebody said so: a recipe (`allow_download`), an option, or the environment."""

from __future__ import annotations

import os
from typing import Final

ALLOW_DOWNLOAD: Final = "NIGHTSEG_ALLOW_DOWNLOAD"  # the workers of a cluster are told, too

HOW_TO_ALLOW: Final = f"allow_download: true in the recipe, or {ALLOW_DOWNLOAD}=1 in the environment"


def allow_downloads() -> None:
    """Weights that are missing are fetched, by this process and by those that it starts."""
    os.environ[ALLOW_DOWNLOAD] = "1"


def may_download() -> bool:
    return os.environ.get(ALLOW_DOWNLOAD) == "1"
