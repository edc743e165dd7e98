"""The page of a check: what was found, and frames with their labels over them. One file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nightseg.data.taxonomy import Taxonomy
from nightseg.report.pictures import Picture, frame_pixels, label_pixels, photo_uri, tinted

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1a1a1a; --dim: #595959; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --ink: #e8e8e8; --dim: #a8a8a8; --warn: #ffb454; } }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--back); color: var(--ink); margin: 0 auto;
  max-width: 1320px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
ul { padding-left: 1.2rem; } .warn { color: var(--warn); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; }
.key i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.12em; }
.key i, .key i.none { border: 1px solid var(--dim); }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; display: block; } figcaption { color: var(--dim); font-size: .85rem; }
"""


def overlay(uri: str, label_uri: str, encoding: str, classes: Taxonomy, caption: str) -> Picture | None:
    """A frame in the colours of its label, dimmed and grey where that is ignored; None where a file is gone."""
    image, label = frame_pixels(uri), label_pixels(label_uri, encoding, classes)
    if image is None or label is None or image.shape[:2] != label.shape:
        return None
    return Picture(photo_uri(tinted(image, label, classes)), caption)


def check_page(
    title: str, found: Sequence[str], warnings: Sequence[str], overlays: Sequence[Picture], classes: Taxonomy
) -> str:
    """HTML that needs no other file."""
    colours = zip(classes.classes, classes.palette, strict=True)
    key = "".join(f'<li><i style="background: rgb{tuple(rgb)}"></i>{escape(name)}</li>' for name, rgb in colours)
    frames = "".join(
        f'<figure><a href="{one.src}"><img src="{one.src}" alt="{escape(one.caption)}"></a>'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in overlays
    )
    warned = f"<h2>To look at</h2><ul class=warn>{_items(warnings)}</ul>" if warnings else ""
    shown = (
        f"<h2>Frames with their labels</h2><ul class=key>{key}<li><i class=none></i>grey: ignored</li></ul>"
        f"<div class=frames>{frames}</div>"
        if overlays
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{warned}{shown}"
        f"<h2>What was found</h2><ul>{_items(found)}</ul></html>\n"
    )


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)
