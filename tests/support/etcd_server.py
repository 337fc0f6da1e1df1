"""Real etcd servers of the tests' own, on free loopback ports: one member or several, with TLS or passwords if wanted.

    with EtcdCluster.started(directory) as cluster:
        ... EtcdConfig(cluster.endpoints)

Data survive `stop`, `kill` and `start` of a member. Every wait is bounded. Needs the Debian package etcd-server, and
openssl for TLS.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollofs.fs.embedded import free_ports
from tests.support.certificates import Certificates
from tests.support.server_process import ServerProcess

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
COMPACT_TIMEOUT_S = 300.0
POLL_S = 0.03
ROOT_PASSWORD = "a password with spaces and 'quotes'"


class EtcdServerError(Exception):
    """A server did not come up, or refused what a test set up; the message has the last of its log."""


@dataclass(frozen=True, slots=True)
class EtcdPorts:
    client: int
    peer: int
    metrics: int


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Ask until it is so. Raises EtcdServerError after `timeout_s`. Blocks: in trio, call it in a thread."""
    pause = threading.Event()
    for _ in range(int(timeout_s / POLL_S)):
        if ready():
            return
        pause.wait(POLL_S)
    raise EtcdServerError(f"{what}: not within {timeout_s:g} s")


class EtcdServer(ServerProcess):
    """One member."""

    def __init__(
        self, name: str, directory: Path, ports: EtcdPorts, cluster: str, certificates: Certificates | None
    ) -> None:
        super().__init__()
        self.name = name
        self.directory = directory
        self.ports = ports
        self._cluster = cluster
        self._certificates = certificates

    @property
    def endpoint(self) -> tuple[str, int]:
        return HOST, self.ports.client

    @property
    def log(self) -> str:
        """What it has written so far."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *, wait: bool = True) -> None:
        """Start with the data of last time; returns when it answers. `wait=False`: at once."""
        assert self._process is None, "it runs"
        if shutil.which("etcd") is None:
            raise EtcdServerError("etcd not found; apt-get install etcd-server")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        if wait:
            self.wait_healthy()

    def wait_healthy(self) -> None:
        """Wait until it answers and has a leader. Raises EtcdServerError if it ends instead."""
        try:
            wait_until(self._healthy_or_dead, f"etcd {self.name} healthy")
        except EtcdServerError as exc:
            raise EtcdServerError(f"{exc}: {self.log[-1500:]}") from None
        if self._process is None or self._process.poll() is not None:
            raise EtcdServerError(f"etcd {self.name} has ended: {self.log[-1500:]}")

    def restart(self) -> None:
        self.stop()
        self.start()

    def metric(self, name: str) -> float:
        """A metric of the server, as `etcd_debugging_mvcc_watcher_total`."""
        status, text = self._get("/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if status != 200 or found is None:
            raise EtcdServerError(f"no metric {name}")
        return float(found[1])

    def compact(self) -> None:
        """Give up all but the newest state, and the room that it took."""
        revision = self.post("/v3/maintenance/status", {})["header"]["revision"]
        self.post("/v3/kv/compaction", {"revision": revision, "physical": True}, COMPACT_TIMEOUT_S)
        self.post("/v3/maintenance/defragment", {}, COMPACT_TIMEOUT_S)

    def post(self, path: str, message: dict[str, object], timeout_s: float = 10.0) -> dict[str, Any]:
        """A call through etcd's JSON gateway, and its answer. Raises EtcdServerError if it is refused."""
        connection = self._gateway(timeout_s)
        try:
            connection.request("POST", path, json.dumps(message), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if answer.status != 200:
            raise EtcdServerError(f"{path}: {answer.status} {text}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _gateway(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._certificates is None:
            return http.client.HTTPConnection(*self.endpoint, timeout=timeout_s)
        context = ssl.create_default_context(cafile=self._certificates.ca)
        context.load_cert_chain(self._certificates.client_cert, self._certificates.client_key)
        return http.client.HTTPSConnection(*self.endpoint, timeout=timeout_s, context=context)

    def _command(self) -> list[str]:
        scheme = "http" if self._certificates is None else "https"
        client_url = f"{scheme}://{HOST}:{self.ports.client}"
        peer_url = f"http://{HOST}:{self.ports.peer}"
        command = ["etcd", "--name", self.name, "--data-dir", str(self.directory / "data"), "--logger", "zap"]
        command += ["--log-outputs", "stderr", "--log-level", "warn", "--snapshot-count", "5000"]
        command += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
        command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
        command += ["--listen-metrics-urls", f"http://{HOST}:{self.ports.metrics}"]
        command += ["--initial-cluster", self._cluster, "--initial-cluster-token", str(self.directory.parent)]
        if self._certificates is not None:
            command += ["--cert-file", self._certificates.server_cert, "--key-file", self._certificates.server_key]
            command += ["--client-cert-auth", "--trusted-ca-file", self._certificates.ca]
        return command

    def _healthy_or_dead(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            return True
        try:
            status, text = self._get("/health")
        except OSError:
            return False
        return status == 200 and '"true"' in text

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.ports.metrics, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


class EtcdCluster:
    """One member or several, of one cluster."""

    def __init__(self, servers: list[EtcdServer], certificates: Certificates | None) -> None:
        self.servers = servers
        self.certificates = certificates

    @classmethod
    @contextmanager
    def started(cls, directory: Path, *, members: int = 1, tls: bool = False) -> Iterator[EtcdCluster]:
        """A new cluster, gone with its directory at the end of the block.

        `tls`: clients must show a certificate, and verify the server's.
        """
        certificates = Certificates.made(directory / "tls") if tls else None
        found = free_ports(3 * members)
        ports = [EtcdPorts(*found[3 * index : 3 * index + 3]) for index in range(members)]
        peers = ",".join(f"m{index}=http://{HOST}:{each.peer}" for index, each in enumerate(ports))
        servers = [
            EtcdServer(f"m{index}", directory / f"m{index}", each, peers, certificates)
            for index, each in enumerate(ports)
        ]
        try:
            for server in servers:
                server.start(wait=False)
            for server in servers:
                server.wait_healthy()
            yield cls(servers, certificates)
        finally:
            for server in servers:
                server.kill()
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def server(self) -> EtcdServer:
        """The first member."""
        return self.servers[0]

    @property
    def endpoints(self) -> tuple[tuple[str, int], ...]:
        return tuple(server.endpoint for server in self.servers)

    def enable_auth(self, *users: tuple[str, str]) -> None:
        """From now on a user is needed: root with ROOT_PASSWORD, who may do all, or one of `users` (name, password),
        who may do nothing.
        """
        for name, password in (("root", ROOT_PASSWORD), *users):
            self.server.post("/v3/auth/user/add", {"name": name, "password": password})
        self.server.post("/v3/auth/role/add", {"name": "root"})
        self.server.post("/v3/auth/user/grant", {"user": "root", "role": "root"})
        self.server.post("/v3/auth/enable", {})
