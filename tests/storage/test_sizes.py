import pytest
from hypothesis import given, strategies as st

from union_igrot.errors import ConfigError
from union_igrot.storage.sizes import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        (1234, 1234),
        ("12b", 12),
        ("5 KB", 5000),
        ("5kib", 5120),
        ("1.5GB", 1_500_000_000),
        ("50GB", 50_000_000_000),
        ("2 TiB", 2 * 2**40),
        ("123456789012345678901", 123456789012345678901),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 PB", "5,0 GB", "1e9", "all", "5G", "nan", True, None, "5 5"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="50GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2_592_000), ("12 h", 43_200), ("90S", 90), ("1.5m", 90), ("2w", 1_209_600)]
)
def test_spans(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "all", None, 30])
def test_what_is_no_span(text):
    with pytest.raises(ConfigError, match="30d"):
        parse_duration(text)


@given(st.integers(0, 10**15))
def test_a_shown_size_is_read_back_to_three_digits(count):
    read = parse_size(format_size(count).replace(",", ""))
    assert abs(read - count) <= max(0, 0.06 * count)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (999_960, "1.0 MB"), (73_400_000_000, "73.4 GB")],
)
def test_sizes_shown(count, shown):
    assert format_size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "moments"), (59, "moments"), (60, "1 minute"), (7300, "2 hours"), (86_400 * 3.9, "3 days")],
)
def test_spans_shown(seconds, shown):
    assert format_duration(seconds) == shown
