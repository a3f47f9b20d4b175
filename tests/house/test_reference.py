"""The reference page is what the commands themselves say."""

from __future__ import annotations

from pathlib import Path

from toolkit.cli import reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference.render(), "run `make docs`"
