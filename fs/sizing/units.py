"""Numbers with units, from the text that people write and back to it."""

from __future__ import annotations

import math
import re
from enum import StrEnum

from apollofs.fs.user_error import UserError


class Unit(StrEnum):
    """What a number counts; the value is what an error calls it."""

    COUNT = "number"
    WHOLE = "whole number"
    BYTES = "size"
    BYTES_S = "rate"
    SECONDS = "time"
    SHARE = "share"


_NUMBER = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|\.[0-9]+) *([^0-9 ]*)", re.IGNORECASE)
_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_BINARY = {letter + "i": 1024.0**power for power, letter in enumerate("kmgtpe", 1)}
_PREFIX = {**_DECIMAL, **_BINARY}
_COUNT = {**_DECIMAL, "b": 1e9}
_TIME = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "y": 365 * 86_400.0}
EXAMPLES = {
    Unit.COUNT: "8192, 405B or 2T",
    Unit.WHOLE: "8192 or 16k",
    Unit.BYTES: "500GB, 1.5TB or 8MiB",
    Unit.BYTES_S: "2.5GB/s or 400Gbit/s",
    Unit.SECONDS: "15s, 30m, 12h or 90d",
    Unit.SHARE: "0.25 or 25%",
}


def parse(text: str, unit: Unit) -> float:
    """A number of this unit: bytes, bytes a second, seconds, or as it is. "m" is a million, or a minute in times.

    Raises UserError with an example of what would do.
    """
    matched = _NUMBER.fullmatch(text.strip())
    factor = _factor(matched[2], unit) if matched else None
    if matched is None or factor is None:
        raise UserError(f"{text!r} is no {unit}: write it as {EXAMPLES[unit]}")
    value = float(re.sub("[_,]", "", matched[1])) * factor
    if not math.isfinite(value):
        raise UserError(f"{text!r} is too large")
    if unit is Unit.WHOLE and value != int(value):
        raise UserError(f"{text!r} is no {unit}")
    return value


def _factor(suffix: str, unit: Unit) -> float | None:
    """What the letters after a number multiply it by; None where they do not fit the unit."""
    if unit is Unit.BYTES_S:
        # only here does the case of a letter count: B is a byte, b a bit
        found = re.fullmatch(r"(.*?)(B|b|bit)(?:/s|ps)", suffix)
        if found is None:
            return 1.0 if suffix == "" else None
        prefix = _PREFIX.get(found[1].lower())
        return prefix if prefix is None or found[2] == "B" else prefix / 8
    small = suffix.lower()
    if unit is Unit.BYTES:
        return _PREFIX.get(small.removesuffix("b"))
    if unit is Unit.SHARE:
        return {"": 1.0, "%": 0.01}.get(small)
    return (_TIME if unit is Unit.SECONDS else _COUNT).get(small)


def show(value: float, unit: Unit) -> str:
    """Three digits and a unit: "2.49 TB/s", "90 d", "25 %"."""
    if unit is Unit.SHARE:
        return f"{_digits(100 * value)} %"
    if unit is Unit.SECONDS:
        return show_time(value)
    if unit in (Unit.COUNT, Unit.WHOLE):
        return show_count(value)
    number, prefix = _scaled(value)
    return f"{number} {prefix}B" + ("/s" if unit is Unit.BYTES_S else "")


def show_bits(bytes_s: float) -> str:
    """A rate as networks count it: "151 Gbit/s"."""
    number, prefix = _scaled(8 * bytes_s)
    return f"{number} {prefix}bit/s"


def show_time(seconds: float) -> str:
    """The largest unit of which there is at least two, or one whole."""
    for factor, name in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * factor or seconds == factor:
            return f"{_digits(seconds / factor)} {name}"
    return f"{_digits(1000 * seconds)} ms" if 0 < seconds < 0.1 else f"{_digits(seconds)} s"


def show_count(value: float) -> str:
    """ "8,192" below a million, "405 B" and "1.54 T" above: billions and trillions, as parameters are counted."""
    if abs(value) < 1e6:
        return f"{value:,.0f}" if value == int(value) else _digits(value)
    number, prefix = _scaled(value)
    return f"{number} {'B' if prefix == 'G' else prefix}"


def _scaled(value: float) -> tuple[str, str]:
    for letter in ("", "k", "M", "G", "T", "P"):
        # what would be rounded up to 1,000 belongs to the next unit
        if abs(value) < 999.5:
            return _digits(value), letter
        value /= 1000
    return _digits(value), "E"


def _digits(value: float) -> str:
    """Three significant digits, and never an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if "e" in text else text
