"""What scripts/demo-sites says and when, and the commands that it shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic

from rich.console import Console

from tests.mounted.harness import COMMAND_DEADLINE_S, Namespace

WAIT_S = 120.0
POLL_S = 0.1
ASKED_OFTEN = ("info", "agent", "seals")
"""Commands that are not shown: the story waits for what they say."""


class DemoError(Exception):
    """Something is not as the story tells it; the message is what the person should read."""


def expect(holds: bool, what: str) -> None:
    """Raises DemoError unless it is so."""
    if not holds:
        raise DemoError(f"not so: {what}")


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Ask until it is so. Raises DemoError after WAIT_S."""
    pause, deadline = Event(), monotonic() + WAIT_S
    while not ready():
        if monotonic() > deadline:
            raise DemoError(f"{what}: not within {WAIT_S:g} s")
        pause.wait(POLL_S)


@dataclass(frozen=True)
class Moment:
    """One line. `where`: a site, or nothing."""

    at_s: float
    where: str
    text: str


@dataclass
class Timeline:
    """Prints each line at once, and keeps it. `figures`: what was measured, seconds."""

    console: Console = field(default_factory=Console)
    began_s: float = field(default_factory=monotonic)
    chapters: list[str] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def chapter(self, title: str) -> None:
        self.chapters.append(title)
        self.console.rule(f"[bold]{title}[/]", align="left")

    def tell(self, where: str, text: str, *, style: str = "") -> None:
        moment = Moment(monotonic() - self.began_s, where, text)
        self.moments.append(moment)
        line = f"{moment.at_s:6.1f} s  {where.upper() or ' '}  {text}"
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    def measured(self, name: str, seconds: float) -> str:
        """Keep a figure; how it reads."""
        self.figures[name] = seconds
        return f"{seconds:.2f} s"

    def write(self, path: Path) -> None:
        told = {"chapters": self.chapters, "figures": self.figures, "moments": [asdict(each) for each in self.moments]}
        path.write_text(json.dumps(told, indent=1))


def shown(timeline: Timeline) -> type[Namespace]:
    """Namespaces whose commands are told as a person would type them, with META_URL for the long address of etcd."""

    class Shown(Namespace):
        """Told in a timeline."""

        def command(self, *words: str, deadline_s: float = COMMAND_DEADLINE_S) -> str:
            if words[0] not in ASKED_OFTEN:
                plain = [word.replace(f"{self.directory}/", "") for word in words if word != "--json"]
                text = shlex.join("META_URL" if word.startswith("etcd://") else word for word in plain)
                timeline.tell("", f"$ apollofs {text}", style="cyan")
            return super().command(*words, deadline_s=deadline_s)

    return Shown
