"""One namespace for a test: a real etcd, a blob store for each site, and mounts of it made with the command line.

    with Namespace.made(directory, [LocalBodies("west"), LocalBodies("east")]) as namespace:
        west, east = namespace.mount("west"), namespace.mount("east")
        (west.path / "file").write_bytes(b"text")
        assert (east.path / "file").read_bytes() == b"text"

Every wait is bounded. At the end all mounts are unmounted (by force and by SIGKILL where they do not want to), the
whole namespace is checked, and what the daemons have logged from WARNING up is reported unless it was announced.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import trio

from apollofs.metadata.check import check_volume
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from tests.support.etcd_server import EtcdCluster
from tests.support.radosgw_server import RadosGateway

ROOT = Path(__file__).parents[2]
VOLUME = "test"
COMMAND_DEADLINE_S = 90.0
END_DEADLINE_S = 30.0
CHECK_DEADLINE_S = 180.0
_ALARMING = re.compile(r"^\S+ (WARNING|ERROR|CRITICAL) ")
_RECORD = re.compile(r"^\d{4}-\d\d-\d\dT\S+ [A-Z]+ ")


class HarnessError(Exception):
    """A command failed, or a mount did not end; the message has what it printed."""


class Bodies(Protocol):
    """Where one site keeps its bodies."""

    @property
    def site(self) -> str: ...

    def url(self, directory: Path) -> str:
        """The BLOB_URL; `directory` is the namespace's."""
        ...

    def environment(self) -> Mapping[str, str]:
        """What a mount needs in its environment to be let in."""
        ...


@dataclass(frozen=True)
class LocalBodies:
    """Plain files below the namespace's directory."""

    site: str

    def url(self, directory: Path) -> str:
        return (directory / f"blobs-{self.site}").as_uri()

    def environment(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class GatewayBodies:
    """A bucket of a radosgw. `endpoint`: another way to it than the gateway's own, through a proxy."""

    site: str
    gateway: RadosGateway
    bucket: str
    endpoint: str = ""

    def url(self, directory: Path) -> str:
        endpoint = self.endpoint or self.gateway.endpoint
        return f"s3://{self.bucket}/bodies?endpoint={endpoint}&region=us-east-1"

    def environment(self) -> Mapping[str, str]:
        user = self.gateway.create_user("apollofs-tests")
        return {
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass
class LogReader:
    """Follows a daemon's log from where it was last read."""

    path: Path
    _at: int = 0

    def news(self) -> list[str]:
        """Records from WARNING up since the last call, each with its traceback."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            text = file.read().decode(errors="replace")
            self._at = file.tell()
        records: list[str] = []
        alarming = False
        for line in text.splitlines():
            if _RECORD.match(line):
                alarming = bool(_ALARMING.match(line))
                if alarming:
                    records.append(line)
            elif alarming:
                records[-1] += f"\n{line}"
            else:
                # Whatever is no record was written by something that should have logged, or by a dying interpreter.
                alarming = True
                records.append(line)
        return records


@dataclass
class Mount:
    """One mount. `path` is where it is; `pid` is its daemon's."""

    namespace: Namespace = field(repr=False)
    site: str
    path: Path
    cache_dir: Path
    pid: int
    log: LogReader = field(repr=False)
    expected_logs: list[str] = field(default_factory=list, repr=False)
    killed: bool = False
    _pidfd: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(self.pid)

    @property
    def is_mounted(self) -> bool:
        """By the kernel's table: a question to the mount itself might never be answered."""
        return any(line.split()[4] == str(self.path) for line in Path("/proc/self/mountinfo").read_text().splitlines())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.namespace.report("status", str(self.path))
        return found

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead: then the kernel has given up the connection."""
        self.killed = True
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.wait_ended()

    def wait_ended(self) -> None:
        if self._pidfd < 0:
            return
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if not poller.poll(END_DEADLINE_S * 1000):
            raise HarnessError(f"the daemon {self.pid} of {self.path} does not end")

    def unmount(self) -> None:
        """As a user would: everything is committed when it returns."""
        self.namespace.command("umount", str(self.path))
        self.wait_ended()

    def clean_up(self) -> list[str]:
        """Leave nothing mounted or running, whatever state it is in; what went wrong on the way."""
        trouble: list[str] = []
        if self.is_mounted:
            try:
                self.unmount()
            except (HarnessError, subprocess.TimeoutExpired) as exc:
                trouble.append(f"{self.path} could not be unmounted: {exc}")
                # By force: that aborts the connection, and frees whoever waits in the kernel.
                subprocess.run(["umount", "-f", "-l", str(self.path)], check=False, timeout=END_DEADLINE_S)
        try:
            self.wait_ended()
        except HarnessError as exc:
            trouble.append(str(exc))
            self.kill()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return trouble

    def alarms(self) -> list[str]:
        """What it has logged from WARNING up since the last call, and nobody announced."""
        expected = [re.compile(pattern) for pattern in self.expected_logs]
        news = self.log.news()
        return [f"{self.site}: {text}" for text in news if not any(one.search(text) for one in expected)]


class Namespace:
    """A formatted volume and its mounts. Made by `made`."""

    def __init__(self, directory: Path, cluster: EtcdCluster, volume: str, sites: Sequence[Bodies]) -> None:
        self.directory = directory
        self.cluster = cluster
        self.volume = volume
        self.mounts: list[Mount] = []
        self._sites = {bodies.site: bodies for bodies in sites}
        # Short, whatever the directory of the test: paths of sockets are.
        self._runtime = tempfile.mkdtemp(prefix="apollofs-")

    @classmethod
    @contextmanager
    def made(
        cls,
        directory: Path,
        sites: Sequence[Bodies],
        *,
        volume: str = VOLUME,
        format_options: Sequence[str] = (),
        members: int = 1,
    ) -> Iterator[Self]:
        """An etcd of so many members and a volume with these sites, all gone at the end of the block. Raises
        HarnessError there if a mount did not end well, the namespace is not sound, or something unexpected was logged.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with EtcdCluster.started(directory / "etcd", members=members) as cluster:
            namespace = cls(directory, cluster, volume, sites)
            try:
                first, *others = sites
                namespace._site_command("format", first, *format_options)
                for bodies in others:
                    namespace._site_command("site", bodies, sub="add")
                yield namespace
            finally:
                trouble = namespace._clean_up()
            if trouble:
                raise HarnessError("\n".join(trouble))

    @property
    def url(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.cluster.endpoints)
        return f"etcd://{hosts}/{self.volume}"

    def environment(self) -> dict[str, str]:
        """For commands and daemons: this process's, and the credentials of the stores."""
        environment = {**os.environ, "APOLLOFS_RUNTIME_DIR": self._runtime}
        for bodies in self._sites.values():
            environment.update(bodies.environment())
        return environment

    check_deadline_s = CHECK_DEADLINE_S
    """A large namespace takes longer."""
    mount_module = "apollofs.fs.cli"
    """What runs `mount`; a test of a mount with a fault has its own."""

    def command(self, *words: str, deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Run `apollofs WORDS...`; what it printed. Raises HarnessError if it fails."""
        module = self.mount_module if words[0] == "mount" else "apollofs.fs.cli"
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
            env=self.environment(),
            cwd=ROOT,
        )
        if done.returncode != 0:
            raise HarnessError(f"apollofs {' '.join(words)}: status {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def report(self, *words: str) -> Any:
        """What a command says with --json."""
        return json.loads(self.command(*words, "--json"))

    def mount(self, site: str, *options: str, name: str = "", url: str = "") -> Mount:
        """Mount the volume at `site`; `options` go to `apollofs mount`. Returns when the mount answers.

        `name` tells several mounts at a site apart; `url` leads to etcd another way, through a proxy.
        """
        name = name or f"{site}{len(self.mounts)}"
        path, cache = self.directory / f"mnt-{name}", self.directory / f"cache-{name}"
        path.mkdir(exist_ok=True)
        log = self.directory / f"{name}.log"
        words = ["mount", url or self.url, str(path), "--site", site, "--cache-dir", str(cache)]
        try:
            facts = self.report(*words, "--log-file", str(log), *options)
        except HarnessError as exc:
            raise HarnessError(f"{exc}\n{log.read_text() if log.exists() else 'no log'}") from None
        mount = Mount(self, site, path, cache, int(facts["pid"]), LogReader(log))
        self.mounts.append(mount)
        return mount

    def violations(self) -> list[str]:
        """What the whole-namespace checker finds. Mounts may be at work meanwhile."""
        return trio.run(self._violations)

    async def _violations(self) -> list[str]:
        store = EtcdStore(EtcdConfig(self.cluster.endpoints))
        try:
            with trio.fail_after(self.check_deadline_s):
                return [str(violation) async for violation in check_volume(store, self.volume)]
        finally:
            await store.aclose()

    def _site_command(self, command: str, bodies: Bodies, *options: str, sub: str = "") -> None:
        words = [command, *([sub] if sub else []), self.url, "--site", bodies.site]
        self.command(*words, "--blobs", bodies.url(self.directory), "--create-bucket", *options)

    def _clean_up(self) -> list[str]:
        trouble = [line for mount in self.mounts for line in mount.clean_up()]
        trouble += [line for mount in self.mounts for line in mount.alarms()]
        try:
            trouble += self.violations()
        except Exception as exc:  # noqa: BLE001  (etcd may be what the test has broken; all must be told)
            trouble.append(f"the namespace could not be checked: {exc!r}")
        for leftover in Path(self._runtime).iterdir():
            # a daemon that was killed could not take its socket away; the next mount there replaces it
            if not any(mount.killed for mount in self.mounts):
                trouble.append(f"left in the runtime directory: {leftover.name}")
            leftover.unlink()
        os.rmdir(self._runtime)
        return trouble
