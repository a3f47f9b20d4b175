"""The ledger's sums, and what it says binds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.cost.memory import CATEGORIES, Entry, Ledger, adam_bytes
from toolkit.errors import InfeasibleError
from toolkit.units import GIB

entries = st.lists(
    st.builds(Entry, st.text(max_size=5), st.sampled_from(CATEGORIES), st.integers(0, 10**12))
)


@given(entries)
def test_the_peak_is_the_sum_with_one_temporary(made):
    ledger = Ledger().with_entries(made)
    lasting = sum(entry.num_bytes for entry in made if entry.category != "temporary")
    fleeting = max((e.num_bytes for e in made if e.category == "temporary"), default=0)
    assert ledger.peak_bytes == lasting + fleeting == sum(ledger.by_category.values())
    assert sum(part for _, _, part in ledger.rows()) == pytest.approx(1 if ledger.rows() else 0)
    assert ledger.fits(ledger.peak_bytes)


def test_what_binds_is_named_with_its_remedy():
    ledger = (
        Ledger()
        .add("weights", "parameters", 2 * GIB)
        .add("layer 3", "activations", 5 * GIB)
        .add("layer 4", "activations", 1 * GIB)
    )
    ledger.check(8 * GIB, where="stage 0")
    with pytest.raises(
        InfeasibleError,
        match=r"stage 0 needs 8 GiB and has 7 GiB; activations take 6 GiB, most of it layer 3; "
        r"recompute",
    ):
        ledger.check(7 * GIB, where="stage 0")
    assert not ledger.fits(7 * GIB)


def test_adam_follows_zero():
    # 2 (weights) + 2 (gradients) + 12 = 16 bytes a parameter of a 16-bit model.
    assert adam_bytes(1e9, parameter_bytes=2) == 12e9
    assert adam_bytes(1e9) == 8e9
    assert adam_bytes(1e9, parameter_bytes=2, master_weights=False) == 8e9


def test_entries_are_checked():
    with pytest.raises(ValueError, match="none of"):
        Entry("x", "weights", 1)
    with pytest.raises(ValueError, match="-1 bytes"):
        Entry("x", "parameters", -1)
