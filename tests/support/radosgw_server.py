"""A real Ceph radosgw on loopback: one monitor, one OSD (bluestore on a file), one gateway; no manager, no systemd.

    with RadosGateway.started(Path(directory)) as gateway:
        user = gateway.create_user("alice")
        ... gateway.endpoint, user.access_key, user.secret_key

Everything lives in one directory. Data survive `stop` and `start`, also `kill` (SIGKILL to all three). Nothing of a
previous run is trusted: `create` ends what its pid files name, if those are still Ceph daemons of this directory, and
empties the directory. Needs the Debian packages ceph-mon, ceph-osd and radosgw.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from apollofs.fs.embedded import free_ports

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")

_CONF = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_network = 127.0.0.0/8
ms_bind_ipv4 = true
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
run_dir = {dir}/run
# Paths of UNIX sockets are short; the directory of a test may not be.
admin_socket =
pid_file = {dir}/run/$name.pid
log_file = {dir}/log/$name.log
log_to_stderr = false
mon_cluster_log_file = {dir}/log/cluster.log
crash_dir = {dir}/log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
mon_warn_on_pool_no_redundancy = false
[mon]
mon_data = {dir}/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 2
paxos_propose_interval = 0.05
paxos_min_wait = 0.02
[osd]
osd_data = {dir}/osd
osd_objectstore = bluestore
bluestore_block_size = {disk_bytes}
osd_memory_target = 939524096
osd_scrub_load_threshold = 0.01
osd_fast_shutdown = true
osd_heartbeat_interval = 6
[client]
keyring = {dir}/keyring
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_data = {dir}/rgw
rgw_dns_name = localhost
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_gc_obj_min_wait = 60
rgw_gc_processor_period = 60
rgw_gc_processor_max_time = 60
rgw_thread_pool_size = 64
# Quotas hold at once, not after the usual minutes.
rgw_bucket_quota_ttl = 0
rgw_user_quota_bucket_sync_interval = 1
"""


class RadosGatewayError(Exception):
    """The cluster did not come up, or a command of it failed; the message has the last of its output."""


@dataclass(frozen=True, slots=True)
class S3User:
    uid: str
    access_key: str
    secret_key: str


@dataclass
class RadosGateway:
    """One cluster. Not thread-safe."""

    directory: Path
    port: int
    mon_port: int
    disk_bytes: int = 16 << 30
    """Size of the sparse file under bluestore."""
    _users: dict[str, S3User] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def started(cls, directory: Path, disk_bytes: int = 16 << 30) -> Iterator[RadosGateway]:
        """A new cluster on free ports, gone with its directory at the end of the block."""
        port, mon_port = free_ports(2)
        gateway = cls(directory, port, mon_port, disk_bytes)
        try:
            gateway.create()
            yield gateway
        finally:
            gateway.destroy()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def create(self) -> None:
        """Make the cluster and start it; whatever lay in the directory is removed. Takes about 7 s."""
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise RadosGatewayError(f"{', '.join(missing)} not found; apt-get install ceph-mon ceph-osd radosgw")
        self.destroy()
        for part in ("mon", "osd", "log", "run", "rgw"):
            (self.directory / part).mkdir(parents=True, mode=0o700)
        fsid = str(uuid.uuid4())
        self._conf.write_text(
            _CONF.format(
                fsid=fsid, mon_port=self.mon_port, dir=self.directory, disk_bytes=self.disk_bytes, port=self.port
            )
        )
        self._make_keys()
        monmap = str(self.directory / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{self.mon_port}]", monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", self._keyring)
        self._run("ceph-mon", "-i", "a")
        self._make_osd()
        self._run("ceph-osd", "-i", "0")
        self._ceph("osd", "crush", "add-bucket", "default", "root")
        self._wait("the OSD", self._osd_is_up)
        self._start_gateway()

    def start(self) -> None:
        """Start what `stop` or `kill` ended; returns when the gateway answers."""
        self._run("ceph-mon", "-i", "a")
        self._run("ceph-osd", "-i", "0")
        self._wait("the OSD", self._osd_is_up)
        self._start_gateway()

    def stop(self) -> None:
        """End all daemons in order, with SIGKILL after some seconds."""
        self._signal_all(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all daemons, as in a power cut."""
        self._signal_all(signal.SIGKILL)

    def stop_gateway(self) -> None:
        """End only the gateway, quickly: connections are refused until `start_gateway`."""
        self._end("client.rgw.a", signal.SIGTERM)

    def start_gateway(self) -> None:
        self._start_gateway()

    def restart(self) -> None:
        self.stop()
        self.start()

    def destroy(self) -> None:
        """End the daemons and remove the directory."""
        self._signal_all(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._users.clear()

    def create_user(self, uid: str) -> S3User:
        """A user with keys of its own; the same one when asked again."""
        if uid not in self._users:
            user = S3User(uid, "AK" + secrets.token_hex(9).upper(), secrets.token_hex(20))
            keys = (f"--access-key={user.access_key}", f"--secret-key={user.secret_key}")
            self.admin("user", "create", f"--uid={uid}", f"--display-name={uid}", *keys)
            self._users[uid] = user
        return self._users[uid]

    def set_quota(self, uid: str, objects_max: int) -> None:
        """Let a user have so many objects in each bucket."""
        scope = (f"--uid={uid}", "--quota-scope=bucket")
        self.admin("quota", "set", *scope, f"--max-objects={objects_max}")
        self.admin("quota", "enable", *scope)

    def admin(self, *arguments: str) -> str:
        """Run radosgw-admin; returns its standard output."""
        return self._run("radosgw-admin", "-n", "client.rgw.a", *arguments)

    @property
    def _conf(self) -> Path:
        return self.directory / "ceph.conf"

    @property
    def _keyring(self) -> str:
        return str(self.directory / "keyring")

    def _make_keys(self) -> None:
        for name, capabilities in (
            ("mon.", ("mon", "allow *")),
            ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
            ("client.rgw.a", ("mon", "allow rw", "osd", "allow rwx")),
        ):
            caps = [
                part for pair in zip(capabilities[::2], capabilities[1::2], strict=True) for part in ("--cap", *pair)
            ]
            create = [] if Path(self._keyring).exists() else ["--create-keyring"]
            self._run("ceph-authtool", *create, self._keyring, "--gen-key", "-n", name, *caps)

    def _make_osd(self) -> None:
        osd_uuid = str(uuid.uuid4())
        secret = self._run("ceph-authtool", "--gen-print-key").strip()
        number = self._ceph("osd", "new", osd_uuid, "-i", "-", text=json.dumps({"cephx_secret": secret})).strip()
        if number != "0":
            raise RadosGatewayError(f"the new cluster gave its first OSD the number {number!r}")
        keyring = str(self.directory / "osd" / "keyring")
        self._run("ceph-authtool", "--create-keyring", keyring, "-n", "osd.0", "--add-key", secret)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)

    def _osd_is_up(self) -> bool:
        found: Mapping[str, Any] = json.loads(self._ceph("osd", "stat", "-f", "json"))
        return int(found["num_up_osds"]) == 1

    def _start_gateway(self) -> None:
        self._run("radosgw", "-n", "client.rgw.a")
        self._wait("radosgw", self._answers)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _ceph(self, *arguments: str, text: str = "") -> str:
        return self._run("ceph", "--connect-timeout", "30", *arguments, text=text)

    def _run(self, *command: str, text: str = "") -> str:
        """Run a command, or start a daemon (they fork into the background); output goes to a file, because a daemon
        that keeps a pipe open would never let us see its end.
        """
        out = self.directory / "log" / f"{command[0]}.out"
        with out.open("w+") as output:
            done = subprocess.run(
                command,
                input=text,
                stdout=output,
                stderr=subprocess.DEVNULL if command[0] in ("ceph", "radosgw-admin") else output,
                text=True,
                timeout=START_TIMEOUT_S,
                check=False,
                env={**os.environ, "CEPH_CONF": str(self._conf)},
            )
            output.seek(0)
            found = output.read()
        if done.returncode != 0:
            raise RadosGatewayError(f"{' '.join(command[:4])}...: status {done.returncode}: {found[-800:]}")
        return found

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(int(START_TIMEOUT_S / POLL_S)):
            if ready():
                return
            pause.wait(POLL_S)
        raise RadosGatewayError(f"{what} did not come up within {START_TIMEOUT_S:g} s; see {self.directory}/log")

    def _signal_all(self, number: signal.Signals) -> None:
        for name in ("client.rgw.a", "osd.0", "mon.a"):
            self._end(name, number)

    def _end(self, name: str, number: signal.Signals) -> None:
        """Signal the daemon of a pid file and wait for its end, if the pid is still that of a daemon of ours."""
        pid_file = self.directory / "run" / f"{name}.pid"
        try:
            pid = int(pid_file.read_text().strip("\0\n "))
            fd = os.pidfd_open(pid)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return
        try:
            if self._is_ours(pid):
                _end_process(fd, number, name)
        except ProcessLookupError:
            return  # it ended by itself meanwhile
        finally:
            os.close(fd)
            pid_file.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        """Pids are reused: believe a pid file only if that process is a Ceph daemon with our configuration."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2]
        except (FileNotFoundError, ProcessLookupError):
            return False
        ours = f"CEPH_CONF={self._conf}\0".encode() in environment
        return ours and program in (b"ceph-mon", b"ceph-osd", b"radosgw")


def _end_process(pidfd: int, number: signal.Signals, name: str) -> None:
    """Signal and wait. A pidfd is readable once its process has ended, also before anybody has reaped it."""
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    for each in (number, signal.SIGKILL):
        signal.pidfd_send_signal(pidfd, each)
        if ended.poll(STOP_TIMEOUT_S * 1000):
            return
    raise RadosGatewayError(f"{name} did not end on SIGKILL")


_SHARED = pytest.StashKey[RadosGateway]()


def shared_gateway(config: pytest.Config) -> RadosGateway:
    """The one cluster of this pytest session, started at the first call and destroyed when the session ends.

    For session fixtures. A test that stops or kills daemons starts them again, or takes a cluster of its own.
    """
    if _SHARED not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        directory = stack.enter_context(
            claimed_directory(Path(tempfile.gettempdir()) / f"apollofs-radosgw-{os.getuid()}")
        )
        config.stash[_SHARED] = stack.enter_context(RadosGateway.started(directory))
    return config.stash[_SHARED]


@contextmanager
def claimed_directory(base: Path) -> Iterator[Path]:
    """A directory below `base` that is locked while this process lives.

    Clusters of sessions that were killed, and so never cleaned up, are ended and removed first.
    """
    base.mkdir(mode=0o700, exist_ok=True)
    for lock_file in base.glob("*.lock"):
        with lock_file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its session is alive
            RadosGateway(lock_file.with_suffix(""), 0, 0).destroy()
            lock_file.unlink(missing_ok=True)
    directory = base / secrets.token_hex(4)
    lock_path = directory.with_suffix(".lock")
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            lock_path.unlink(missing_ok=True)
