"""The fixture that fails a test on unexpected log records."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import LogWatch

LOG = logging.getLogger("apollofs.metadata.example")


def test_a_warning_that_nobody_announced_is_unexpected() -> None:
    watch = LogWatch()
    watch.handle(logging.LogRecord("apollofs.fs", logging.WARNING, "", 1, "lease %s lost", (7,), None))
    assert watch.unexpected() == ["WARNING apollofs.fs: lease 7 lost"]
    watch.expect(r"lease \d lost")
    assert watch.unexpected() == []
    assert watch.messages() == ["lease 7 lost"]


@pytest.mark.expects_log("announced by the mark")
def test_a_mark_announces_a_pattern() -> None:
    LOG.warning("this was announced by the mark")


def test_the_fixture_announces_a_pattern(log_watch: LogWatch) -> None:
    LOG.error("announced inside, number %d", 3)
    log_watch.expect("number 3$")


def test_information_is_never_counted(log_watch: LogWatch) -> None:
    LOG.info("nothing to see")
    assert log_watch.messages() == []
