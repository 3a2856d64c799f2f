"""What the tests of commands share."""

from collections.abc import Callable

import pytest


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command with wrong arguments; return the one line that it prints before it exits with 2."""

    def call(main: Callable[[list[str]], None], *words: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        printed = capsys.readouterr().err
        assert (stopped.value.code, printed.count("\n")) == (2, 1), printed
        return printed

    return call
