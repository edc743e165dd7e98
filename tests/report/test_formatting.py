"""Numbers as people read them."""

from nightseg.report import formatting

NARROW = "\u202f"


def test_numbers() -> None:
    assert (
        formatting.percent(0.41249) == "41.2"
        and formatting.percent(None) == "\u2013"
        and formatting.percent(0.6, 0) == "60"
    )
    assert (
        formatting.points(1.24) == "+1.2"
        and formatting.points(-0.5) == "\u22120.5"
        and formatting.points(0.04) == "\u00b10.0"
    )
    assert formatting.points(None) == ""
    assert [formatting.significant(value) for value in (-0.5, 0.0512, 12345.4)] == [
        "\u22120.5",
        "0.0512",
        f"12{NARROW}345",
    ]
    values = (0.99995, 2.0, 1e-5, 12345, 100000.25, True, "v1.0")
    assert [*map(formatting.plain, values)] == ["0.99995", "2", "1e-05", "12345", "100000.25", "True", "v1.0"]
    pretty = ["0.99995", "2", "1e\u221205", f"12{NARROW}345", f"100{NARROW}000.25", "True", "v1.0"]
    assert [*map(formatting.exact, values)] == pretty
    assert formatting.count(14937) == f"14{NARROW}937" and formatting.plural(1, "stage") == "1 stage"
    assert formatting.plural(2, "stage") == "2 stages"
    assert formatting.short("abcdefghijklmnop") == "abcdefghijkl"


def test_durations_do_not_show_sixty_seconds() -> None:
    shown = [formatting.duration(value).replace(NARROW, " ") for value in (0.04, 9.94, 59.6, 185, 7800)]
    assert shown == ["0.0 s", "9.9 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]


def test_models_and_rules() -> None:
    model = {
        "train": ["day", "day_at_night"],
        "start": "imagenet",
        "loss": {"kind": "combined", "alpha": 0.5, "gamma": 2.0, "focal_weight": 1.0},
        "self_training": {"pool": "street", "select": {"method": "pooled", "count": 1600}},
    }
    assert formatting.describe(model).replace(NARROW, " ") == (
        "on day + day_at_night · from imagenet · combined, \u03b1 0.5, \u03b3 2 · "
        "pseudo-labels for 1 600 frames of street (pooled)"
    )
    whole_pool = model | {"loss": {"kind": "focal", "gamma": 2.0}, "self_training": {"pool": "street", "select": None}}
    assert formatting.describe(whole_pool).endswith("focal, \u03b3 2 · pseudo-labels for all of street")
    plain = model | {"loss": {"kind": "cross_entropy"}, "self_training": None}
    assert formatting.describe(plain) == "on day + day_at_night · from imagenet · cross-entropy"
    assert formatting.threshold({"kind": "none"}) == "every pixel is kept"
    assert "0.9 or more" in formatting.threshold({"kind": "fixed", "confidence": 0.9})
    balanced = {"kind": "class_balanced", "confidence": 0.9, "share": 0.6, "floor": 0.0, "precision": None}
    assert formatting.threshold(balanced) == (
        "the surest 60 % of every class are kept, and all pixels with confidence 0.9 or more"
    )
    assert formatting.threshold(balanced | {"floor": 0.8, "precision": 0.95}).endswith(
        "confidence 0.9 or more, but none with less than 0.8; raised until 95 % are right on labelled frames"
    )
