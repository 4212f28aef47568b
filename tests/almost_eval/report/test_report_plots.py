"""Plots: well-formed, in the page's colours, their text as text."""

import xml.etree.ElementTree as ElementTree

from almost_eval.report.plots import Series, by_length, profile

SERIES = [
    Series(0, [0.5, None, 0.9], [(0.4, 0.6), None, (0.8, 1.0)]),
    Series(9, [0.2, 0.3, 0.4], [(0.1, 0.3), None, (0.3, 0.5)]),
]


def test_profile() -> None:
    svg = profile(["helpful", "harmless", "honest"], SERIES, ident="b0", title="accuracy")
    root = ElementTree.fromstring(svg)
    text = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"helpful", "harmless", "honest", "100 %"} <= set(text)
    assert root.attrib["aria-label"] == "accuracy"
    assert "width" not in root.attrib  # the page says how wide


def test_colours_are_the_page_s() -> None:
    svg = profile(["x", "y", "z"], SERIES, ident="b0", title="t")
    assert "var(--s0)" in svg
    assert "var(--s1)" in svg  # the tenth model has the second colour again
    assert "currentColor" in svg
    assert "var(--rule)" in svg
    for placeholder in ("#f0f0f", "#010203", "#040506", "#000000", "#ffffff", "<style", "<metadata"):
        assert placeholder not in svg


def test_ids_do_not_meet_those_of_another_plot() -> None:
    def ids(svg: str) -> set[str]:
        return {element.attrib["id"] for element in ElementTree.fromstring(svg).iter() if "id" in element.attrib}

    first, second = (profile(["x", "y", "z"], SERIES, ident=ident, title="t") for ident in ("b0", "b1"))
    assert ids(first)
    assert not ids(first) & ids(second)
    references = {part.split(")")[0].split('"')[0] for part in first.replace("url(#", 'href="#').split('href="#')[1:]}
    assert references <= ids(first)


def test_by_length() -> None:
    svg = by_length([0.5, 1.0, 2.1], [SERIES[0]], ident="r", title="t")
    text = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "1/2\u00d7" in text
    assert "length of the model's answer over the other's" in text


def test_drawn_the_same_twice() -> None:
    assert profile(["x", "y", "z"], SERIES, ident="b", title="t") == profile(
        ["x", "y", "z"], SERIES, ident="b", title="t"
    )
