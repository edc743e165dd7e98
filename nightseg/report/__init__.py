"""The report of a run: one self-contained HTML page, and the picture strip of the README.

It reads results.json and committed outputs, and nothing else: no stage, no torch, no ray.
"""

from nightseg.report.page import write_report
from nightseg.report.strip import strip_image

__all__ = ["strip_image", "write_report"]
