"""The templates beside this file, and how they write numbers."""

from __future__ import annotations

import re

import jinja2
from markupsafe import Markup

from nightseg.report import formatting

FILTERS = ("percent", "points", "with_spread", "gain", "decimals", "count", "duration", "short", "sentence", "interval",
           "significant", "exact", "plural")  # fmt: skip


def template(name: str, *, is_page: bool = True) -> jinja2.Template:
    """A template; in a page texts of the user are never markup."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("nightseg.report", ""),
        autoescape=is_page,  # noqa: S701 (a text for readers of Markdown has no markup to escape)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_name in FILTERS:
        found.filters[filter_name] = getattr(formatting, filter_name)
    found.filters["breakable"] = breakable
    return found.get_template(name)


def breakable(name: str) -> Markup:
    """A name that may be broken after its joints, so that long ones do not widen a table."""
    return Markup("<wbr>").join(re.split(r"(?<=[_./-])", name))  # join escapes the parts
