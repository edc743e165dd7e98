"""The hint behind a word that is not known."""

from nightseg.errors import closest


def test_the_closest_known_word_is_offered_and_only_if_it_is_close() -> None:
    assert closest("cityscape19", ("cityscapes19", "camvid11")) == ", did you mean 'cityscapes19'?"
    assert closest("zebra", ("cityscapes19", "camvid11")) == ""
    assert closest("a", {}) == ""
