"""Builds pjdfstest in a scratch directory and runs it on a mount. Run by scripts/pjdfstest, from the root."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from tests.mounted.harness import Bodies, GatewayBodies, HarnessError, LocalBodies, Namespace
from tests.mounted.variants import EagerNamespace
from tests.support.radosgw_server import RadosGateway
from tests.support.random_recalls import RandomRecalls

BUILD = ("autoreconf -ifs", "./configure --quiet", "make --quiet pjdfstest")
BUILD_DEADLINE_S = 300
RUN_DEADLINE_S = 5400
_SUMMARY = re.compile(r"^Files=(\d+), Tests=(\d+)", re.MULTILINE)


def build(source: Path, scratch: Path) -> Path:
    """The directory with the suite's tests, beside its program."""
    copy = scratch / "pjdfstest"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
    for command in BUILD:
        done = subprocess.run(
            command.split(), cwd=copy, capture_output=True, text=True, timeout=BUILD_DEADLINE_S, check=False
        )
        if done.returncode != 0:
            raise HarnessError(f"{command}: {done.stderr[-2000:]}")
    # What POSIX leaves open is asked for as well: as on ext4, where a rename moves the time of the last change.
    with (copy / "tests" / "conf").open("a") as conf:
        conf.write("fs=EXT4\n")
    return copy / "tests"


@contextmanager
def bodies(kind: str, scratch: Path) -> Iterator[Bodies]:
    if kind == "local":
        yield LocalBodies("here")
        return
    with RadosGateway.started(scratch / "radosgw") as gateway:
        yield GatewayBodies("here", gateway, "pjdfstest")


@contextmanager
def recalled(namespace: Namespace) -> Iterator[None]:
    """Delegations are recalled at random moments meanwhile. Fails if none was."""
    with RandomRecalls.started(namespace.cluster.endpoints, namespace.volume, seed=1) as recalls:
        yield
        counts = recalls.end()
    print(f"{counts['notices']} delegations recalled, {counts['writers']} times by a writer that waited")
    if not counts["notices"]:
        raise HarnessError("nothing was recalled")


def run(tests: Path, directory: Path, only: list[str]) -> tuple[int, str]:
    """prove's status and output; the latter is shown while it comes."""
    chosen = [str(tests / name) for name in only] or [str(tests)]
    command = ["timeout", "--foreground", str(RUN_DEADLINE_S), "prove", "--recurse", *chosen]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    return process.wait(), "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/pjdfstest")
    parser.add_argument("source", type=Path)
    parser.add_argument("--blobs", choices=("radosgw", "local"), default="radosgw")
    parser.add_argument("--recalls", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apollofs-pjdfstest-")))
        scratch.chmod(0o755)
        tests = build(options.source, scratch)
        site = stack.enter_context(bodies(options.blobs, scratch))
        kind = EagerNamespace if options.recalls else Namespace
        namespace = stack.enter_context(kind.made(scratch / "namespace", [site]))
        directory = namespace.mount("here").path / "suite"
        directory.mkdir(0o755)
        with recalled(namespace) if options.recalls else nullcontext():
            status, output = run(tests, directory, options.only)
        left = os.listdir(directory)
    found = _SUMMARY.search(output)
    failed = [line.split(" (")[0] for line in output.splitlines() if "(Wstat:" in line]
    files, assertions = found.groups() if found else ("?", "?")
    print(f"{files} files, {assertions} assertions, {len(failed)} files failed; left behind: {len(left)}")
    for line in failed:
        print(f"  {os.path.relpath(line.strip(), tests)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
