import json
import re
from html.parser import HTMLParser

import pytest

from toolkit.timeline import Counter, Span, Timeline, html

NASTY = "</script><script>alert(1)</script><!--{data}--> & \" ' <img src=x onerror=alert(1)> \u2028"


class Page(HTMLParser):
    """What a browser would find: elements, text, and the data element's content."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.data, self._inside = [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self._inside = dict(attrs).get("id", "code")

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = None

    def handle_data(self, data):
        if self._inside == "data":
            self.data += data
        elif self._inside is None:
            self.text.append(data)


def test_nothing_a_name_holds_is_taken_for_markup():
    span = Span(NASTY, NASTY, 0, 1, "measured", NASTY, {NASTY: NASTY})
    counter = Counter(NASTY, ((0.0, 1.0),), unit=NASTY)
    table = html.Table(NASTY, [NASTY], [[NASTY]])
    clean = Page(
        html.render(
            [Timeline("t", (Span("s", "t", 0, 1, detail={"a": 1}),), (Counter("c", ((0, 1),)),))],
            title="page",
            tables=[html.Table("c", ["h"], [["r"]])],
        )
    )
    page = Page(html.render([Timeline(NASTY, (span,), (counter,))], title="page", tables=[table]))
    assert page.tags == clean.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    found = json.loads(page.data)["timelines"][0]
    assert found["names"] == [NASTY]
    assert found["title"] == NASTY
    assert found["details"] == {"0": {NASTY: NASTY}}
    assert "".join(page.text).count(NASTY) == 6  # title, caption and track; the table's three


def test_the_page_asks_for_nothing_else(step):
    text = html.render([step])
    assert "default-src 'none'" in text
    page = Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not any(name in ("src", "href") for name, _ in page.attributes)
    assert not re.findall(r"https?://", text)


def test_only_the_introduction_is_taken_as_html(step):
    text = html.render([step], intro_html="<p>see <b>here</b></p>")
    assert "<p>see <b>here</b></p>" in text


def test_spans_are_ordered_so_that_rows_can_be_searched(step):
    data = json.loads(Page(html.render([step])).data)["timelines"][0]
    columns = data["columns"]
    assert [(half["track"], half["source"]) for half in data["halves"]] == list(step.tracks)
    rows = [row for half in data["halves"] for row in half["rows"]]
    assert [first for first, _ in rows] == [0, *(last for _, last in rows[:-1])]
    assert rows[-1][1] == len(step.spans) == len(columns["start"])
    for first, last in rows:
        for at in range(first, last - 1):
            assert columns["start"][at] + columns["length"][at] <= columns["start"][at + 1]


def test_the_summary_says_predicted_and_measured_in_words(step):
    text = " ".join("".join(Page(html.render([step])).text).split())
    assert re.search(
        r"predicted [\d.]+ ms · measured [\d.]+ ms · measured against predicted \+", text
    )
    assert "one step: predicted and measured time by track" in text


def test_tables_align_numbers_and_refuse_ragged_rows(step):
    table = html.Table("Step time, measured", ["what", "seconds>"], [["step", 1.5]])
    assert "<td class=number>1.5</td>" in html.render([step], tables=[table])
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        html.render([step], tables=[html.Table("t", ["a", "b"], [["only one"]])])


def test_a_single_timeline_names_the_page(step, tmp_path):
    html.write(step, tmp_path / "a.html")
    assert "<title>one step</title>" in (tmp_path / "a.html").read_text("utf-8")


def test_no_timelines_and_empty_ones_still_make_a_page(tmp_path):
    html.write([], tmp_path / "none.html", title="None")
    html.write([Timeline("empty")], tmp_path / "empty.html")
    assert "no spans" in (tmp_path / "empty.html").read_text("utf-8")


def test_a_name_that_is_no_text_does_not_stop_the_page(tmp_path):
    span = Span("\udcff", "\udcff", 0, 1, group="\udcff")
    html.write(Timeline("\udcff", (span,)), tmp_path / "a.html")
