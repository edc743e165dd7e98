"""The report of a run: one self-contained HTML page, and pictures for a README or a note: the strip, the sheet.

It reads results.json and committed outputs, and nothing else: no stage, no torch, no ray.
"""

from nightseg.report.comparison import headline, model_to_use
from nightseg.report.model_card import model_card
from nightseg.report.page import write_report
from nightseg.report.run import Run
from nightseg.report.sheets import contact_sheet, strip_image, translation_sheet

__all__ = [
    "Run",
    "contact_sheet",
    "headline",
    "model_card",
    "model_to_use",
    "strip_image",
    "translation_sheet",
    "write_report",
]
