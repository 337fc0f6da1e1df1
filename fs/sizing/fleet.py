"""Where the GPUs are, what they are there for, and what joins the places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apollofs.fs.sizing.units import Unit, parse
from apollofs.fs.user_error import UserError

GPUS_MAX = 10_000_000
SITES_MAX = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Site:
    """One place. `inference_share` of its GPUs serve or roll out, the others train; None: as the workload says."""

    name: str
    gpus: int
    inference_share: float | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """What joins two sites: bytes a second each way (0: not given, it is asked what is needed), and a round trip."""

    first: str
    second: str
    rate_bytes_s: float = 0.0
    round_trip_s: float | None = None

    @property
    def ends(self) -> frozenset[str]:
        """Both names; a link has no direction."""
        return frozenset((self.first, self.second))


@dataclass(frozen=True, slots=True)
class Fleet:
    """All sites and links, checked when made: UserError says what does not fit together."""

    sites: tuple[Site, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if not names:
            raise UserError("there is no GPU to plan for: give --gpus N, or --site NAME=GPUS for each site")
        if len(names) > SITES_MAX:
            raise UserError(f"{len(names)} sites: at most {SITES_MAX} can be planned")
        for site in self.sites:
            _check_site(site)
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the site {name!r} is given twice")
        for link in self.links:
            if len(link.ends) == 1 or not link.ends <= set(names):
                raise UserError(f"the link {link.first},{link.second} must join two of the sites: {', '.join(names)}")
            if sum(other.ends == link.ends for other in self.links) > 1:
                raise UserError(f"the link {link.first},{link.second} is given twice")

    def link(self, first: str, second: str) -> Link:
        """What joins two sites. Without any link given each pair has one; else UserError where there is none."""
        for link in self.links:
            if link.ends == {first, second}:
                return link
        if self.links:
            raise UserError(f"bytes must go from {first} to {second}, and no link joins them")
        return Link(first, second)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each two sites once, in the order of the sites."""
        for place, site in enumerate(self.sites):
            for other in self.sites[place + 1 :]:
                yield site.name, other.name


def _check_site(site: Site) -> None:
    if not NAME.fullmatch(site.name):
        raise UserError(f"{site.name!r} is no name of a site: letters, digits, dots, dashes")
    if not 1 <= site.gpus <= GPUS_MAX:
        raise UserError(f"{site.name} has {site.gpus:,} GPUs: 1 to {GPUS_MAX:,} can be planned")
    if site.inference_share is not None and not 0 <= site.inference_share <= 1:
        raise UserError(f"{site.name}: the share of inference is {site.inference_share}: 0 to 1 is possible")


def parse_site(text: str) -> Site:
    """A site of "north=4000" or "north=4000,inference=50%". Raises UserError."""
    name, equals, rest = text.partition("=")
    words = rest.split(",")
    if not equals or len(words) > 2 or (len(words) == 2 and not words[1].startswith("inference=")):
        raise UserError(f"{text!r} is no site: write NAME=GPUS or NAME=GPUS,inference=SHARE")
    share = parse(words[1].removeprefix("inference="), Unit.SHARE) if len(words) == 2 else None
    return Site(name.strip(), int(parse(words[0], Unit.WHOLE)), share)


def parse_link(text: str) -> Link:
    """A link of "north,south=100Gbit/s" or "north,south=100Gbit/s,12ms". Raises UserError."""
    ends, _, rest = text.partition("=")
    names, words = ends.split(","), rest.split(",")
    if len(names) != 2 or len(words) > 2 or not words[0]:
        raise UserError(f"{text!r} is no link: write NAME,NAME=RATE or NAME,NAME=RATE,ROUND_TRIP")
    rate = parse(words[0], Unit.BYTES_S)
    if rate <= 0:
        raise UserError(f"the link {ends} carries nothing")
    return Link(names[0].strip(), names[1].strip(), rate, parse(words[1], Unit.SECONDS) if len(words) == 2 else None)


def in_order_of_size(sites: Sequence[Site]) -> list[Site]:
    """Largest first, the earlier of two that are equal."""
    return sorted(sites, key=lambda site: -site.gpus)
