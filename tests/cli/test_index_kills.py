"""No kill of `union-index` loses or doubles a row."""

import pytest

pytest.importorskip("lance", reason='the extra "gallery" is not installed')
from index_kills import kill_many

KILLS = 10


@pytest.mark.slow
def test_no_kill_of_the_command_loses_or_doubles_a_row(tmp_path):
    seen, starts = kill_many(tmp_path, KILLS, images=150)
    assert sum(seen.values()) == KILLS <= starts
