"""What holds for every test: a warning in apollofs's log that the test did not announce fails it.

A test announces what it provokes with `@pytest.mark.expects_log("pattern", ...)`, or, where the text is known only
inside, through the `log_watch` fixture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.running_order import rank

# no test is about how fast this machine is
hypothesis.settings.register_profile("apollofs", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("apollofs")

# a machine whose checks are explained as those of a test are
pytest.register_assert_rewrite("tests.model.two_mounts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, for runs with several at a time."""
    items.sort(key=lambda item: rank(item.nodeid.partition("::")[0]))


class LogWatch(logging.Handler):
    """Collects records of the logger `apollofs` and those below it, from WARNING up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[logging.LogRecord] = []
        self._expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def expect(self, pattern: str) -> None:
        """From now on, and for what was logged before, messages in which `pattern` is found are part of the test."""
        self._expected.append(re.compile(pattern))

    def messages(self) -> list[str]:
        """Every message collected so far, expected or not, in order."""
        return [record.getMessage() for record in list(self._records)]

    def unexpected(self) -> list[str]:
        """One line for each record that no pattern matches, with its traceback if it has one."""
        form = logging.Formatter("%(levelname)s %(name)s: %(message)s")
        return [
            form.format(record)
            for record in list(self._records)
            if not any(pattern.search(record.getMessage()) for pattern in self._expected)
        ]


@pytest.fixture(autouse=True)
def log_watch(request: pytest.FixtureRequest) -> Iterator[LogWatch]:
    """The watch over this test's log; unexpected records fail the test when it ends."""
    watch = LogWatch()
    for marker in request.node.iter_markers("expects_log"):
        for pattern in marker.args:
            watch.expect(pattern)
    logger = logging.getLogger("apollofs")
    logger.addHandler(watch)
    try:
        yield watch
    finally:
        logger.removeHandler(watch)
    unexpected = watch.unexpected()
    if unexpected:
        pytest.fail("unexpected log records:\n" + "\n".join(unexpected), pytrace=False)
