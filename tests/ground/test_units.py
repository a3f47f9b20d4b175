import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from toolkit import units
from toolkit.errors import UsageError

counts = st.integers(0, 10**15)


@given(st.floats(0, 1e6), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB"]))
def test_sizes_are_read_whatever_the_case_and_spacing(number, unit):
    size = units.parse_bytes(f"{number}{unit}")
    assert size == units.parse_bytes(f" {number} {unit.upper()} ")
    assert size == units.parse_bytes(f"{number} {unit.lower()}")


def test_binary_and_decimal_sizes_differ():
    assert units.parse_bytes("1 KiB") == 1024
    assert units.parse_bytes("1 kB") == 1000
    assert units.parse_seconds("90") == units.parse_seconds("1.5 min") == 90.0


@given(counts)
def test_a_shown_size_reads_back_to_three_digits(num_bytes):
    assert units.parse_bytes(units.format_bytes(num_bytes)) == pytest.approx(
        num_bytes, rel=5.1e-3, abs=0.51
    )


@given(st.floats(1e-6, 59.9))
def test_a_shown_duration_reads_back_to_three_digits(seconds):
    assert units.parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=5.1e-3)


@given(st.floats(1e-3, 9e17))
@example(999.5)
@example(999.49)
@example(999_500.0)
def test_three_digits_never_round_into_a_fourth_or_an_exponent(number):
    for text in (units.format_flops(number), units.format_flops(number, per_second=True)):
        assert "e+" not in text
        assert float(text.split()[0]) < 1000


@pytest.mark.parametrize("text", ["", "GiB", "1 GiX", "-1", "1 2", "one", "1_000", "0x10", "nan"])
def test_what_is_no_quantity_is_refused_with_the_units_that_are_known(text):
    for parse in (units.parse_bytes, units.parse_seconds):
        with pytest.raises(UsageError, match="write a number and one of"):
            parse(text)


def test_zero_and_the_unending_are_shown_and_not_divided_by():
    assert units.format_bytes(0) == "0 B"
    assert units.format_seconds(0) == "0 s"
    assert units.format_bytes(float("inf")) == "inf B"


@pytest.mark.parametrize("num_bytes", [1000, 1020, 1000 * 1024, 5000 * 1024**4])
def test_sizes_between_a_thousand_and_a_unit_have_no_exponent(num_bytes):
    assert "e+" not in units.format_bytes(num_bytes)


def test_just_under_a_minute_is_not_zero_minutes():
    assert units.format_seconds(59.97) in ("60 s", "1 min 0 s")


def test_a_negative_duration_keeps_its_size():
    assert units.format_seconds(-90) == "-1 min 30 s"


def test_nanoseconds_are_read_as_they_are_shown():
    assert units.parse_seconds(units.format_seconds(5e-9)) == pytest.approx(5e-9)


@pytest.mark.parametrize("parse", [units.parse_bytes, units.parse_seconds])
def test_a_number_too_large_to_hold_is_refused(parse):
    with pytest.raises(UsageError):
        parse("1e400")
