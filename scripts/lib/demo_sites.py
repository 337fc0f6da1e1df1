"""Three sites on one machine, and what happens to them: see scripts/demo-sites, and demo_story.py for the story."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo_story import tell
from demo_timeline import DemoError, Timeline, shown

from tests.mounted.harness import HarnessError
from tests.mounted.three_sites import ThreeSites
from tests.support.etcd_server import EtcdServerError
from tests.support.radosgw_server import RadosGateway, RadosGatewayError

DISK_BYTES = 4 << 30
"""Size of the sparse file under the S3 server."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo-sites", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where everything is made")
    parser.add_argument("--json", type=Path, help="write the timeline and its figures there")
    options = parser.parse_args()
    timeline = Timeline()
    try:
        timeline.chapter("three buckets of an S3 server, an etcd of three members, three sites")
        with (
            RadosGateway.started(options.directory / "s3", DISK_BYTES) as gateway,
            ThreeSites.started(
                options.directory / "sites",
                gateway,
                "demo",
                kind=shown(timeline),
                format_options=("--block-size", "1M"),
            ) as sites,
        ):
            tell(sites, timeline)
            timeline.chapter("taking it down, and checking the whole namespace once more")
        timeline.tell("", "All of it was as it should be.", style="bold green")
    except (DemoError, HarnessError, EtcdServerError, RadosGatewayError) as exc:
        timeline.tell("", f"demo-sites: {exc}", style="bold red")
        return 1
    finally:
        if options.json:
            timeline.write(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
