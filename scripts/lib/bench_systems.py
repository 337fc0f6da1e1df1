"""The filesystems that are compared, each mounted on the same etcd and the same radosgw; all taken down at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config

from tests.support.etcd_server import EtcdCluster
from tests.support.radosgw_server import RadosGateway, S3User

COMMAND_DEADLINE_S = 120
UNARY = ("Range", "Put", "DeleteRange", "Txn")
"""The requests of etcd's KV service: what operations on files cost. Watches and leases serve the whole mount."""


class BenchError(Exception):
    """A filesystem could not be mounted or unmounted."""


@dataclass(frozen=True)
class Servers:
    """Where both systems keep what they store."""

    etcd: EtcdCluster
    gateway: RadosGateway
    directory: Path
    environment: Mapping[str, str]

    @property
    def etcd_address(self) -> str:
        host, port = self.etcd.server.endpoint
        return f"{host}:{port}"

    def requests(self) -> int:
        """How many KV requests etcd has answered so far."""
        url = f"http://127.0.0.1:{self.etcd.server.ports.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = tuple(f'grpc_method="{name}"' for name in UNARY)
        return sum(
            int(float(line.rpartition(" ")[2]))
            for line in lines
            if line.startswith("grpc_server_handled_total") and any(name in line for name in wanted)
        )

    def run(self, *words: str) -> None:
        """Raises BenchError with what the command wrote, but not with its arguments: some are secret."""
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S,
            check=False, env=dict(self.environment),
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchError(f"{words[0]} {words[1]}: status {done.returncode}: {done.stdout}{done.stderr}")


@contextmanager
def servers() -> Iterator[Servers]:
    """Started in a scratch directory, gone at the end of the block."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apollofs-bench-")))
        etcd = stack.enter_context(EtcdCluster.started(directory / "etcd"))
        gateway = stack.enter_context(RadosGateway.started(directory / "rgw"))
        user = gateway.create_user("bench")
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "APOLLOFS_RUNTIME_DIR": str(directory / "run"),
        }
        make_bucket(gateway, user, "bench-juicefs")
        yield Servers(etcd, gateway, directory, environment)


def make_bucket(gateway: RadosGateway, user: S3User, bucket: str) -> None:
    """By path: JuiceFS itself would look for a host of the bucket's name."""
    client = boto3.client(
        "s3",
        endpoint_url=gateway.endpoint,
        aws_access_key_id=user.access_key,
        aws_secret_access_key=user.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=bucket)


@contextmanager
def apollofs(on: Servers) -> Iterator[Path]:
    """A fresh volume, mounted; gives the mountpoint."""
    command = (sys.executable, "-m", "apollofs.fs.cli")
    url = f"etcd://{on.etcd_address}/bench"
    mountpoint = on.directory / "apollofs"
    mountpoint.mkdir()
    blobs = f"s3://bench-apollofs/bodies?endpoint={on.gateway.endpoint}&region=us-east-1"
    on.run(*command, "format", url, "--site", "here", "--blobs", blobs, "--create-bucket")
    on.run(
        *command, "mount", url, str(mountpoint), "--site", "here",
        "--cache-dir", str(on.directory / "cache-apollofs"), "--log-file", str(on.directory / "apollofs.log"),
    )  # fmt: skip
    try:
        yield mountpoint
    finally:
        on.run(*command, "umount", str(mountpoint))


@contextmanager
def juicefs(on: Servers, program: str) -> Iterator[Path]:
    """Likewise with JuiceFS: no trash and no backups of its metadata, that it does nothing beside the work."""
    meta, mountpoint = f"etcd://{on.etcd_address}/juicefs", on.directory / "juicefs"
    mountpoint.mkdir()
    on.run(
        program, "format", "--storage", "s3", "--bucket", f"{on.gateway.endpoint}/bench-juicefs", "--access-key",
        on.environment["AWS_ACCESS_KEY_ID"], "--secret-key", on.environment["AWS_SECRET_ACCESS_KEY"],
        "--trash-days", "0", meta, "bench",
    )  # fmt: skip
    on.run(
        program, "mount", "-d", "--no-usage-report", "--backup-meta", "0", "--enable-xattr", "--cache-dir",
        str(on.directory / "cache-juicefs"), "--log", str(on.directory / "juicefs.log"), meta, str(mountpoint),
    )  # fmt: skip
    try:
        yield mountpoint
    finally:
        on.run(program, "umount", str(mountpoint))
