"""`apollofs` whose bridge to Kafka has small transactions, leaves its group after a short time, and dies at a step.

    python -m tests.faults.dying_bridge STEP NUMBER changes ... --kafka ...

It dies by SIGKILL in its transaction NUMBER (from 1 on, the first one of a new group being that of the first position):
at `sent` its messages are on the way, at `delivered` the brokers have them, at `committed` consumers have them, and the
group in etcd does not know yet. STEP may be `never`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import Any

from confluent_kafka import Producer

from apollofs.fs import change_bridge, change_kafka
from apollofs.fs.cli.app import main
from apollofs.metadata.changes import log
from apollofs.metadata.changes.groups import open_group

STEPS = ("sent", "delivered", "committed")
LEASE_S = 3
BATCH_RECORDS = 20


class DyingProducer(Producer):
    """See the module."""

    step = "never"
    left = 0

    def begin_transaction(self) -> None:
        DyingProducer.left -= 1
        super().begin_transaction()

    def flush(self, *words: Any, **named: Any) -> int:
        self._die_at("sent")
        return super().flush(*words, **named)

    def commit_transaction(self, *words: Any, **named: Any) -> None:
        self._die_at("delivered")
        super().commit_transaction(*words, **named)
        self._die_at("committed")

    def _die_at(self, step: str) -> None:
        if DyingProducer.left <= 0 and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    DyingProducer.step, DyingProducer.left = sys.argv[1], int(sys.argv[2])
    log.BATCH_RECORDS = change_bridge.SEND_RECORDS = BATCH_RECORDS
    change_bridge.open_group = functools.partial(open_group, ttl_s=LEASE_S)  # type: ignore[attr-defined]
    change_kafka.Producer = DyingProducer  # type: ignore[attr-defined]
    sys.exit(main(sys.argv[3:]))
