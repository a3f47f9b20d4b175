"""The inner search finds what trying everything finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.plan.search.intra_op import Edge, Node, Problem


@st.composite
def problems(draw) -> tuple[Problem, float]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    nodes = tuple(
        Node(str(i), rng.random(n).round(2), rng.integers(0, 10, n)) for i, n in enumerate(sizes)
    )
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, len(sizes), (draw(st.integers(0, 9)), 2))]
    edges = tuple(Edge(a, b, rng.random((sizes[a], sizes[b])).round(2)) for a, b in pairs)
    return Problem(nodes, edges), draw(st.sampled_from([0.0, 0.3, 0.6, 1.0]))


def brute(problem: Problem, limit: float) -> float | None:
    """Try everything, with the costs as they are given."""
    best = None
    for options in itertools.product(*(range(len(node.seconds)) for node in problem.nodes)):
        chosen = list(zip(problem.nodes, options, strict=True))
        if sum(node.memory[k] for node, k in chosen) > limit:
            continue
        seconds = sum(node.seconds[k] for node, k in chosen)
        seconds += sum(e.seconds[options[e.first], options[e.second]] for e in problem.edges)
        best = seconds if best is None else min(best, seconds)
    return best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_best_under_a_memory_limit_is_what_brute_force_finds(drawn) -> None:
    problem, tightness = drawn
    most = sum(float(np.max(node.memory)) for node in problem.nodes)
    limit = problem.least_memory + tightness * (most - problem.least_memory)
    for memory_limit in (limit, math.inf):
        found = problem.solve(memory_limit, gap=0.0, time_limit_s=30)
        wanted = brute(problem, memory_limit)
        assert found is not None
        assert found.seconds == pytest.approx(wanted, abs=1e-9)
        assert found.memory <= memory_limit
        assert found.bound_s <= found.seconds + 1e-9


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_integer_program_alone_finds_it_too(drawn) -> None:
    problem, tightness = drawn
    most = sum(float(np.max(node.memory)) for node in problem.nodes)
    limit = problem.least_memory + tightness * (most - problem.least_memory)
    found = problem._integer(limit, 30, 0.0)
    assert found is not None
    assert found.seconds == pytest.approx(brute(problem, limit), abs=1e-6)


def test_nothing_fits_below_the_least_memory() -> None:
    problem = Problem((Node("a", [1.0, 2.0], [5, 3]),))
    assert problem.solve(2) is None
    found = problem.solve(4)
    assert found is not None
    assert found.options == (1,)
