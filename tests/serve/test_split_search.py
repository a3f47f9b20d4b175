"""The search for a cut: the best there is on monotone costs, steady, aligned, on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_device
from toolkit.hardware.share import check_disjoint
from toolkit.serve.split import layouts
from toolkit.serve.split.search import Mode, SearchConfig, greedy, search

L20 = find_device("l20")


@st.composite
def costs(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Seconds of prefill and decode at each cut: prefill falls with its part, decode rises."""
    num = draw(st.integers(1, 40))
    steps = st.lists(st.floats(0, 2, allow_nan=False), min_size=num, max_size=num)
    prefill, decode = draw(steps), draw(steps)
    falling = [1.0 + sum(prefill[at:]) for at in range(num)]
    rising = [1.0 + sum(decode[: at + 1]) for at in range(num)]
    return falling, rising


def found(
    prefill: list[float], decode: list[float], mode: Mode, config: SearchConfig, start: int
) -> int:
    return search(
        len(prefill),
        lambda cut: prefill[cut],
        lambda cut: decode[cut],
        least_prefill_s=1.0,
        least_decode_s=1.0,
        mode=mode,
        config=config,
        start=start,
    )


def exhaustive(prefill: list[float], decode: list[float], mode: Mode, config: SearchConfig) -> int:
    """The best feasible cut for the mode's phase; where none is, the other phase's best."""
    cuts = range(len(prefill))
    if mode is Mode.PREFILL:
        return max((cut for cut in cuts if decode[cut] <= config.beta), default=0)
    return min((cut for cut in cuts if prefill[cut] <= config.alpha), default=len(prefill) - 1)


modes = st.sampled_from(list(Mode))
slacks = st.builds(SearchConfig, alpha=st.floats(1, 10), beta=st.floats(1, 10))


@settings(max_examples=400, deadline=None)
@given(costs(), modes, slacks, st.data())
def test_it_finds_what_looking_everywhere_does(pair, mode, config, data) -> None:
    prefill, decode = pair
    start = data.draw(st.integers(0, len(prefill) - 1))
    at = found(prefill, decode, mode, config, start)
    assert at == exhaustive(prefill, decode, mode, config)
    # From its own result it does not move, and looks at no more than the place and the next.
    looked: list[int] = []

    def seconds(cut: int) -> float:
        looked.append(cut)
        return prefill[cut] if mode is Mode.DECODE else decode[cut]

    again = search(
        len(prefill), seconds, seconds, least_prefill_s=1.0, least_decode_s=1.0, mode=mode,
        config=config, start=at,
    )  # fmt: skip
    assert again == at
    feasible_somewhere = at not in (0, len(prefill) - 1)
    if feasible_somewhere:
        assert len(looked) <= 2


@settings(max_examples=200, deadline=None)
@given(costs(), modes, slacks, st.data())
def test_it_is_feasible_and_maximal_or_at_the_bound(pair, mode, config, data) -> None:
    prefill, decode = pair
    at = found(prefill, decode, mode, config, data.draw(st.integers(0, len(prefill) - 1)))
    if mode is Mode.PREFILL:
        assert decode[at] <= config.beta or at == 0
        assert at == len(decode) - 1 or decode[at + 1] > config.beta
    else:
        assert prefill[at] <= config.alpha or at == len(prefill) - 1
        assert at == 0 or prefill[at - 1] > config.alpha


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.data())
def test_any_costs_end_within_the_device_and_are_asked_once(holds, data) -> None:
    asked: list[int] = []

    def feasible(at: int) -> bool:
        asked.append(at)
        return holds[at]

    at = greedy(feasible, data.draw(st.integers(0, len(holds) - 1)), len(holds))
    assert 0 <= at < len(holds)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("name", ["l20", "a100", "h100", "mi300x", "generic-cpu", "v100"])
def test_every_division_is_aligned_disjoint_and_the_whole_device(name: str) -> None:
    device = find_device(name)
    smallest, multiple = device.unit_granularity
    found = layouts.divided(device)
    assert len({str(layout) for layout in found}) == len(found)
    for layout in found:
        check_disjoint((layout.prefill, layout.decode))
        assert layout.prefill.units + layout.decode.units == device.num_units
        assert layout.prefill.units % multiple == 0
        assert layout.prefill.units >= smallest
        assert not layout.undivided
        assert layouts.at(device, layout.prefill.units) == layout
    assert layouts.undivided(device).undivided


def test_a_single_unit_cannot_be_divided() -> None:
    with pytest.raises(InfeasibleError, match="cannot be divided"):
        layouts.divided(find_device("generic-cpu").sliced(1))
    with pytest.raises(UsageError, match="to 90 in steps of 2"):
        layouts.at(L20, 3)


def test_two_devices_have_nothing_in_common() -> None:
    layout = layouts.apart(L20, replace(L20, name="other"))
    assert layout.whole is None
    assert not layout.undivided
    assert not layout.prefill.overlaps(layout.decode)
    with pytest.raises(UsageError, match="different names"):
        layouts.apart(L20, L20)


class TestMode:
    def test_it_is_switched_by_the_cache_and_goes_back_later(self) -> None:
        config, mode, seen = SearchConfig(), Mode.PREFILL, []
        for usage in (0.5, 0.7, 0.71, 0.69, 0.66, 0.64, 0.69):
            mode = config.mode(usage, mode)
            seen.append(mode is Mode.DECODE)
        assert seen == [False, False, True, True, True, False, False]

    @given(st.lists(st.floats(0.66, 0.70), max_size=50))
    def test_noise_around_the_switch_changes_it_once_at_most(self, noise) -> None:
        config, mode, changes = SearchConfig(), Mode.DECODE, 0
        for usage in noise:
            now = config.mode(usage, mode)
            changes += now is not mode
            mode = now
        assert changes == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"alpha": 0.9}, "alpha"), ({"beta": 0}, "beta"), ({"kv_switch": 2}, "kv_switch"),
     ({"delta": -1}, "delta")],
)  # fmt: skip
def test_wrong_numbers_are_named(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SearchConfig(**wrong)


def test_the_smallest_move_is_whole_granules() -> None:
    assert SearchConfig(delta=0.05).delta_units(L20) == 6
    assert SearchConfig(delta=0.0).delta_units(L20) == 2
    assert SearchConfig(delta=0.05).delta_units(find_device("h100")) == 8
