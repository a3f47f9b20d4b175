"""Links between pages lead somewhere, and every page is found from the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("toolkit/**/README.md"))
)


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files a page links to, and the headings in them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#") for target in found if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, name) for path, _, name in local]


def headings(page: Path) -> set[str]:
    """Return the names that a page's headings have in links, as code hosts make them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in links(page):
        assert target.exists(), f"{target} is not there"
        assert not heading or heading in headings(target), f"{target} has no heading {heading}"


def test_every_page_is_two_clicks_from_the_front() -> None:
    front, index = ROOT / "README.md", ROOT / "docs" / "README.md"
    reached = {index, *(target for target, _ in links(front))}
    assert index in {target for target, _ in links(front)}
    reached |= {target for target, _ in links(index)}
    reached |= {target for target, _ in links(ROOT / "docs" / "adr" / "README.md")}
    reached |= {target for target, _ in links(ROOT / "docs" / "benchmarks" / "README.md")}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= reached
