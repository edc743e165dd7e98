"""Numbers and settings as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nightseg.metrics.bootstrap import LEVEL, FrameSpread
from nightseg.metrics.seeds import Difference

_THIN = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.4125 -> "41.2"; the sign is the page's; a dash for what is not defined."""
    return "\N{EN DASH}" if fraction is None else f"{100 * fraction:.{digits}f}"


def decimals(value: float | None, digits: int = 2) -> str:
    """1.234 -> "1.23"; a dash for what is not defined."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def significant(value: float) -> str:
    """Three significant digits, thousands apart: 0.05, 12 345."""
    return (count(round(value)) if abs(value) >= 1000 else f"{value:.3g}").replace("-", _MINUS)


def plain(value: bool | float | str) -> str:
    """A value as one would write it, with all of its digits, so that others look otherwise: 0.99995, 12345, focal."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def exact(value: bool | float | str) -> str:
    """The same on a page, thousands apart: 0.99995, 12 345, focal."""
    if isinstance(value, bool | str):
        return plain(value)
    return f"{value:,}".removesuffix(".0").replace(",", _THIN).replace("-", _MINUS)


def points(value: float | None) -> str:
    """A difference in percentage points with its sign: +1.2."""
    if value is None:
        return ""
    text = f"{abs(value):.1f}"
    if text == "0.0":
        return "\N{PLUS-MINUS SIGN}0.0"
    return ("+" if value > 0 else _MINUS) + text


def with_spread(fraction: float, std: float | None) -> str:
    """In percent: 41.2 +- 0.6, or 41.2 where there is no spread."""
    return percent(fraction) + ("" if std is None else f" \N{PLUS-MINUS SIGN} {percent(std)}")


def gain(found: Difference) -> str:
    """A difference of fractions in points, with its sign and spread: +8.1 +- 0.6."""
    return points(100 * found.mean) + ("" if found.std is None else f" \N{PLUS-MINUS SIGN} {percent(found.std)}")


def interval(found: FrameSpread, signed: bool = False) -> str:
    """95 % interval over 80 frames: 44.1 to 50.3."""
    low, high = (points(100 * end) if signed else percent(end) for end in found.interval)
    return f"{LEVEL:.0%} interval over {plural(found.units, found.of)}: {low} to {high}".replace("%", " %", 1)


def count(number: int) -> str:
    """12 345 with thin spaces."""
    return f"{number:,}".replace(",", _THIN)


def plural(number: int, noun: str) -> str:
    """1 stage, 2 stages."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{_THIN}s"
    if whole < 3600:
        return f"{whole // 60}{_THIN}min {whole % 60:02d}{_THIN}s"
    return f"{whole // 3600}{_THIN}h {whole % 3600 // 60:02d}{_THIN}min"


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]


def short(text: str, letters: int = 12) -> str:
    """The beginning of a hash."""
    return text[:letters]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> as few of its last words as tell it from the others."""
    keys, words = list(keys), 1
    while True:
        found = {key: ".".join(key.split(".")[-words:]) for key in keys}
        if len(set(found.values())) == len(found):
            return found
        words += 1


def describe(model: Mapping[str, Any]) -> str:
    """One line about a model: its data, start, loss and self-training."""
    parts = [f"on {' + '.join(model['train'])}", f"from {model['start']}", _loss(model["loss"])]
    learning = model.get("self_training")
    if learning:
        chosen = learning.get("select")
        how = (
            f"{plural(chosen['count'], 'frame')} of {learning['pool']} ({chosen['method']})"
            if chosen
            else f"all of {learning['pool']}"
        )
        online = learning.get("mode") == "online"
        parts.append(f"self-training online on {how}" if online else f"pseudo-labels for {how}")
    return " \N{MIDDLE DOT} ".join(parts)


def _loss(loss: Mapping[str, Any]) -> str:
    match loss["kind"]:
        case "cross_entropy":
            return "cross-entropy"
        case "focal":
            return f"focal, \N{GREEK SMALL LETTER GAMMA} {loss['gamma']:g}"
        case kind:
            alpha, gamma = (
                f"\N{GREEK SMALL LETTER ALPHA} {loss['alpha']:g}",
                f"\N{GREEK SMALL LETTER GAMMA} {loss['gamma']:g}",
            )
            return f"{kind}, {alpha}, {gamma}"


def threshold(rule: Mapping[str, Any]) -> str:
    """A threshold rule in words."""
    match rule["kind"]:
        case "none":
            return "every pixel is kept"
        case "fixed":
            return f"pixels with confidence {rule['confidence']:g} or more are kept"
        case _:
            floor, precision = rule.get("floor"), rule.get("precision")
            return (
                f"the surest {percent(rule['share'], 0)} % of every class are kept, "
                f"and all pixels with confidence {rule['confidence']:g} or more"
                + (f", but none with less than {floor:g}" if floor else "")
                + (f"; raised until {percent(precision, 0)} % are right on labelled frames" if precision else "")
            )
