"""How near each site's store is, by what requests to it have taken; and which of them are in trouble now.

A site that was not asked yet counts as near, so that each is tried once. One that failed, or was so slow that another
was asked instead, is asked last for a while, longer each time, and then first again by one reader: it is so that it is
found to be back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import trio

log = logging.getLogger(__name__)
MIB = 1 << 20
WEIGHT = 0.2
"""Of the newest measurement in the mean."""
FAR_S = 0.05
"""What a site that was never asked is taken to need, if it is not this one's own."""
REST_FIRST_S, REST_MAX_S = 1.0, 30.0


@dataclass(slots=True)
class _Site:
    """`unit_s`: mean time of a request, with as much again for each MiB; 0: never measured."""

    unit_s: float = 0.0
    rest_s: float = 0.0
    """How long it is left alone after its last trouble; 0: it is well."""
    rests_until: float = 0.0


class Nearness:
    """Of the sites of a volume, as seen from site `here` (0: from nowhere in particular)."""

    def __init__(self, here: int) -> None:
        self.here = here
        self._sites: dict[int, _Site] = {}

    def expected_s(self, site: int, size_bytes: int) -> float:
        """How long a read of so many bytes will take there."""
        unit_s = self._of(site).unit_s or (0.0 if site == self.here else FAR_S)
        return unit_s * (1 + size_bytes / MIB)

    def order(self, sites: Iterable[int]) -> list[int]:
        """Nearest first; those in trouble last. A site whose rest is over comes first once, and rests on otherwise."""
        found = sorted(set(sites), key=lambda site: (self._rests(site), self.expected_s(site, 0), site != self.here))
        for site in found:
            state = self._of(site)
            if state.rest_s and not self._rests(site):
                state.rests_until = trio.current_time() + state.rest_s
                found.remove(site)
                return [site, *found]
        return found

    def is_well(self, site: int) -> bool:
        return not self._of(site).rest_s

    def answered(self, site: int, took_s: float, size_bytes: int) -> None:
        """A read there went well."""
        state = self._of(site)
        unit_s = took_s / (1 + size_bytes / MIB)
        state.unit_s = unit_s if not state.unit_s else (1 - WEIGHT) * state.unit_s + WEIGHT * unit_s
        if state.rest_s:
            state.rest_s = 0.0
            log.info("site %d answers again", site)

    def troubled(self, site: int, why: str) -> None:
        """It failed, or was too slow: others are asked first for a while."""
        state = self._of(site)
        if self._rests(site):
            return
        if not state.rest_s:
            log.info("site %d is asked last for a while: %s", site, why)
        state.rest_s = min(2 * state.rest_s, REST_MAX_S) or REST_FIRST_S
        state.rests_until = trio.current_time() + state.rest_s

    def statistics(self) -> Mapping[str, float]:
        """For `status`: what a small request to each site takes, in seconds."""
        return {f"site_{number}_s": state.unit_s for number, state in sorted(self._sites.items())}

    def _of(self, site: int) -> _Site:
        return self._sites.setdefault(site, _Site())

    def _rests(self, site: int) -> bool:
        return self._of(site).rests_until > trio.current_time() and bool(self._of(site).rest_s)
