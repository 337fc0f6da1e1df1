"""A file of librdkafka's properties, lines as `security.protocol=SASL_SSL`. It may hold credentials: messages tell no
more of a line than its number and its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from apollofs.fs.user_error import UserError

FILE_BYTES_MAX = 64 << 10
_NAME = re.compile(r"[a-z][a-z0-9._]*")
RESERVED = (
    "acks",
    "bootstrap.servers",
    "enable.auto.commit",
    "enable.idempotence",
    "group.id",
    "isolation.level",
    "message.timeout.ms",
    "metadata.broker.list",
    "request.required.acks",
    "transaction.timeout.ms",
    "transactional.id",
)
"""What exactly-once rests on, and what options of the command say."""


def read_settings(path: str) -> Mapping[str, str]:
    """Raises UserError where the file can't be read, has a line that is none, or sets what the bridge sets."""
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        text = content.decode()
    except OSError as exc:
        raise UserError(f"{path} can't be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    if len(content) > FILE_BYTES_MAX:
        raise UserError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
    settings: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip()[0] in "#!":
            continue
        name, sign, value = line.partition("=")
        name = name.strip()
        if not sign or not _NAME.fullmatch(name):
            raise UserError(f"{path}, line {number}: it should be name=value")
        if name in RESERVED:
            raise UserError(f"{path}, line {number}: {name} can't be set, the bridge sets it")
        if name in settings:
            raise UserError(f"{path}, line {number}: {name} stands there twice")
        settings[name] = value.strip()
    return settings
