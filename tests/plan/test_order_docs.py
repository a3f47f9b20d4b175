"""The figures of the schedules page are what the toolkit prints. To write them anew:
TOOLKIT_WRITE_FIGURES=1 pytest tests/plan/test_order_docs.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from toolkit.plan.order import Stage, clock, show
from toolkit.plan.order.families import FAMILIES, build
from toolkit.plan.order.search import search
from toolkit.plan.order.shared import interlaced_costs, published_interlaced

PAGE = Path(__file__).parents[2] / "docs/concepts/schedules.md"
SHARED, LAYER = Stage(1, 1, 0, 0), Stage(1, 1, 2, 1)


def figure(name):
    if name == "searched":
        found = search(published_interlaced(), 6, time_limit_s=60)
        return show.text(found.schedule, "interlaced, searched")
    if name == "interlaced":
        order = build(name, 4, 6)
        return show.text(clock.run(order, interlaced_costs(4, SHARED, LAYER)), order.name)
    order = build(name, 4, 8)
    return show.text(clock.run(order), order.name)


@pytest.mark.parametrize("name", [*FAMILIES, "searched"])
def test_figures_are_what_the_toolkit_prints(name):
    page = PAGE.read_text("utf-8")
    begin, end = f"<!-- figure {name} -->\n```\n", "\n```\n"
    assert page.count(begin) == 1, f"the page has no figure {name}"
    start = page.index(begin) + len(begin)
    stop = page.index(end, start)
    drawn = figure(name)
    if os.environ.get("TOOLKIT_WRITE_FIGURES"):
        PAGE.write_text(page[:start] + drawn + page[stop:], "utf-8")
        return
    if name == "searched":
        # Many orders are as short, and which one the solver finds is its version's business.
        assert page[start:stop].splitlines()[-3:] == drawn.splitlines()[-3:]
    else:
        assert page[start:stop] == drawn


def test_numbers_of_the_table_are_those_of_the_tables():
    """The page's table for 4 devices and 8 microbatches, every pass taking 1."""
    page = PAGE.read_text("utf-8")
    for name in FAMILIES:
        order = build(name, 4, 8)
        costs = interlaced_costs(4, Stage(1, 1, 0, 0), Stage()) if name == "interlaced" else Stage()
        schedule = clock.run(order, costs)
        stall = max(schedule.stall(d) for d in range(4))
        cells = [
            f"{schedule.makespan:g}",
            f"{schedule.bubble:.1%}",
            f"{stall:g}",
            f"{schedule.peak:g}",
        ]
        row = rf"\| `{re.escape(name)}` \| " + r" \| ".join(map(re.escape, cells)) + r" \|"
        assert re.search(row, page), f"the page should say of {name}: {' | '.join(cells)}"
