"""Every number that a plan stands on: its unit, its bounds, and where it comes from. Nothing else is assumed anywhere.

Each is a field of one of four groups, and can be changed by its name, which is unique over all groups. `estimate` marks
what no document states: our own judgement, to be replaced by what you know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from apollofs.fs.sizing.units import Unit, parse, show
from apollofs.fs.user_error import UserError
from apollofs.metadata.format import BLOCK_BYTES_DEFAULT

LARGE = 1e21
DAY_S = 86_400.0


def _given(
    value: float,
    unit: Unit,
    meaning: str,
    source: str,
    *,
    low: float = 0.0,
    high: float = LARGE,
    estimate: bool = False,
) -> Any:
    """A field with its default; `low` and `high` are allowed themselves."""
    about = {"unit": unit, "meaning": meaning, "source": source, "low": low, "high": high, "estimate": estimate}
    return field(default=value, metadata=about)


LLAMA = "The Llama 3 Herd of Models (Meta, 2024)"
GB200 = "NVIDIA DGX GB200 data sheet"
SUPERPOD = "NVIDIA DGX SuperPOD reference architecture, GB200"
CEPH_TB = "Clyso, Ceph: a journey to 1 TiB/s (2024)"
YOURS = "your workload"
COUNT, WHOLE, BYTES, BYTES_S, SECONDS, SHARE = (
    Unit.COUNT,
    Unit.WHOLE,
    Unit.BYTES,
    Unit.BYTES_S,
    Unit.SECONDS,
    Unit.SHARE,
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the GPUs do."""

    params: float = _given(
        0, COUNT, "parameters of the model that each site trains; 0: params_per_gpu for each training GPU", YOURS
    )
    params_per_gpu: float = _given(
        250e6,
        COUNT,
        "parameters for each training GPU of the site",
        f"between 25 M ({LLAMA}: 405 B on 16,384) and 328 M (DeepSeek-V3 Technical Report, 2024: 671 B on 2,048)",
        estimate=True,
    )
    weight_bytes_per_param: float = _given(2, BYTES, "a weight, as it is published", "bfloat16", low=0.1, high=64)
    optimizer_bytes_per_param: float = _given(
        12,
        BYTES,
        "what a checkpoint holds besides the weights",
        "fp32 master copy and the two moments of Adam: 12 (Rajbhandari et al., ZeRO, 2020, section 3.1)",
        high=256,
    )
    ranks_per_gpu: float = _given(
        1, WHOLE, "processes a training GPU; each writes one file a save", "torch.distributed.checkpoint", high=64
    )
    inference_share: float = _given(
        0.25, SHARE, "GPUs that serve or roll out, where a site does not say", YOURS, high=1, estimate=True
    )
    save_interval_s: float = _given(
        900, SECONDS, "from one checkpoint to the next", "near the optimum that the plan prints", low=1, estimate=True
    )
    save_stall_s: float = _given(
        15, SECONDS, "a checkpoint is durable after this", "1.7 % of the interval", low=0.01, estimate=True
    )
    restart_s: float = _given(
        600,
        SECONDS,
        "from a failure until the ranks run again and may read",
        f"{LLAMA} trained for over 90 % of the time",
        estimate=True,
    )
    restore_s: float = _given(60, SECONDS, "in which a restart reads the checkpoint", YOURS, low=0.1, estimate=True)
    restore_copies: float = _given(
        1, COUNT, "how often a restart reads the state: 1 where replicas pass it on", YOURS, low=0.01, estimate=True
    )
    failures_a_day: float = _given(0, COUNT, "failures of a site's training a day; 0: by failures_per_gpu_day", YOURS)
    failures_per_gpu_day: float = _given(
        419 / 54 / 16_384, COUNT, "failures a training GPU a day", f"{LLAMA}: 419 in 54 days on 16,384 GPUs", high=24
    )
    dataset_bytes_per_gpu: float = _given(
        7.3e12,
        BYTES,
        "datasets kept at a site for each of its training GPUs",
        "video and images included",
        estimate=True,
    )
    dataset_file_bytes: float = _given(
        4e9, BYTES, "a file of a dataset", "shards of tar archives", low=1, estimate=True
    )
    dataset_passes: float = _given(2, COUNT, "how often a run reads all of it", YOURS, estimate=True)
    dataset_shared: float = _given(
        0.1,
        SHARE,
        "of a site's datasets, what is new in a run and comes from the lead site",
        YOURS,
        high=1,
        estimate=True,
    )
    run_s: float = _given(30 * DAY_S, SECONDS, "a training run", YOURS, low=60, estimate=True)
    publishes_an_hour: float = _given(
        12, COUNT, "weights handed over to inference", "online RL, many times an hour", high=3600, estimate=True
    )
    publish_copy_s: float = _given(
        240,
        SECONDS,
        "published weights are at every site after this",
        "within the 5 min to the next",
        low=0.1,
        estimate=True,
    )
    publish_load_s: float = _given(
        300, SECONDS, "in which a site's inference GPUs load new weights", "12 an hour", low=0.1, estimate=True
    )
    publish_kept_s: float = _given(7 * DAY_S, SECONDS, "published weights are kept", YOURS, estimate=True)
    weights_file_bytes: float = _given(5e9, BYTES, "a file of published weights", "safetensors shards", low=1)
    memory_for_weights: float = _given(
        0.5,
        SHARE,
        "of an inference GPU's memory; the rest is KV cache",
        "our judgement",
        low=0.01,
        high=1,
        estimate=True,
    )
    scratch_bytes_per_gpu: float = _given(
        0.25e12, BYTES, "all else: homes, logs, rollouts, evaluations", YOURS, estimate=True
    )
    scratch_file_bytes: float = _given(256e6, BYTES, "a file of that", YOURS, low=1, estimate=True)


@dataclass(frozen=True, slots=True)
class Retention:
    """What stays, and when the rest goes."""

    keep_last: float = _given(10, WHOLE, "newest checkpoints that stay", YOURS, low=1, high=1e6, estimate=True)
    keep_every: float = _given(
        4, WHOLE, "every Kth stays for keep_for; 0: none", "one an hour", high=1e6, estimate=True
    )
    keep_for_s: float = _given(
        90 * DAY_S, SECONDS, "how long every Kth stays", "a training run and after", estimate=True
    )
    save_copies: float = _given(
        1, WHOLE, "other sites that get a copy of every Kth, largest first", YOURS, high=100, estimate=True
    )
    gc_interval_s: float = _given(3600, SECONDS, "from one clean-up to the next", "docs/GC.md: now and then", low=60)
    gc_grace_s: float = _given(3600, SECONDS, "what was dropped stays so long", "docs/GC.md: default of --grace")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What machines hold and carry."""

    gpu_memory_bytes: float = _given(186e9, BYTES, "memory of a GPU", GB200, low=1e9)
    gpus_per_node: float = _given(4, WHOLE, "GPUs a node, which is one mount", GB200, low=1, high=1024)
    gpus_per_rack: float = _given(72, WHOLE, "GPUs a rack", f"{GB200}: NVL72", low=1, high=4096)
    racks_per_unit: float = _given(8, WHOLE, "GPU racks are bought in units of this many", SUPERPOD, low=1, high=1024)
    node_network_bytes_s: float = _given(
        25e9, BYTES_S, "a node to storage", "one 200 Gbit/s port of its BlueField-3", low=1, estimate=True
    )
    node_disk_bytes: float = _given(15.36e12, BYTES, "local disk for staging and cache", f"{GB200}: 4 x 3.84 TB", low=1)
    server_drives: float = _given(10, WHOLE, "drives a storage server", f"{CEPH_TB}: Dell R6615", low=1, high=1000)
    drive_bytes: float = _given(15.36e12, BYTES, "a drive", CEPH_TB, low=1e9)
    server_read_bytes_s: float = _given(
        8e9,
        BYTES_S,
        "reads of a storage server, erasure-coded",
        f"half the 16.6 GB/s of {CEPH_TB}",
        low=1,
        estimate=True,
    )
    server_write_bytes_s: float = _given(
        5e9,
        BYTES_S,
        "writes of a storage server, before parity",
        f"below the reads, as in {CEPH_TB}",
        low=1,
        estimate=True,
    )
    servers_per_rack: float = _given(
        32, WHOLE, "storage servers a rack", "1U each, 42U", low=1, high=1000, estimate=True
    )
    data_shards: float = _given(
        8, WHOLE, "data shards of the erasure code", "8+3: any three servers may fail", low=1, high=256, estimate=True
    )
    parity_shards: float = _given(3, WHOLE, "parity shards", "as above", high=256, estimate=True)
    fill_limit: float = _given(0.85, SHARE, "how full a store may be", "Ceph: mon_osd_nearfull_ratio", low=0.1, high=1)
    gateway_bytes_s: float = _given(
        10e9, BYTES_S, "an S3 gateway", "radosgw on a host with 100 Gbit/s, four fifths of it", low=1, estimate=True
    )
    gateway_spare: float = _given(
        0.1, SHARE, "gateways on top that may be down", "one of eleven", high=10, estimate=True
    )
    link_outages_a_day: float = _given(
        0.1, COUNT, "outages of a link a day, when days are played", YOURS, high=1000, estimate=True
    )
    link_outage_s: float = _given(1800, SECONDS, "how long one lasts", YOURS, low=1, estimate=True)


@dataclass(frozen=True, slots=True)
class Services:
    """What etcd, S3 and apollofs take and give."""

    store_efficiency: float = _given(
        0.85,
        SHARE,
        "of the stores' throughput, in daily use",
        "failed drives, rebuilds, skew",
        low=0.1,
        high=1,
        estimate=True,
    )
    link_efficiency: float = _given(
        0.85, SHARE, "of a link, that copying reaches", "what replication aims at", low=0.1, high=1, estimate=True
    )
    block_bytes: float = _given(
        BLOCK_BYTES_DEFAULT, BYTES, "an object of S3", "apollofs format: default", low=4096, high=1 << 30
    )
    client_cpu_s_a_gb: float = _given(
        1.2,
        SECONDS,
        "processor time of a node for each GB it moves",
        "the bound that apollofs sets itself",
        estimate=True,
    )
    etcd_bytes_a_file: float = _given(154, BYTES, "of etcd for a file", "docs/BENCHMARKS.md, Many files", low=1)
    etcd_history_bytes: float = _given(
        150, BYTES, "history of a change until compaction", "docs/BENCHMARKS.md, Many files: 304 - 154"
    )
    etcd_compact_s: float = _given(
        3600, SECONDS, "from compaction to compaction", "etcd: auto-compaction", low=1, estimate=True
    )
    etcd_quota_bytes: float = _given(
        8e9, BYTES, "database of one etcd", "etcd.io, system limits: 8 GB at most", low=1e6
    )
    etcd_fill: float = _given(0.7, SHARE, "how full it may be", "room for bursts", low=0.05, high=1, estimate=True)
    etcd_requests_s: float = _given(
        15_000,
        COUNT,
        "transactions a second of one etcd",
        "a third of the 50,000 single puts in etcd.io, Performance: ours write several keys",
        low=1,
        estimate=True,
    )
    requests_a_new_file: float = _given(
        2.2, COUNT, "requests of etcd to make a file", "docs/BENCHMARKS.md, Far from etcd: create, write, close"
    )
    requests_a_load: float = _given(
        5,
        COUNT,
        "requests of a mount to find what is new",
        "docs/BENCHMARKS.md, Far from etcd: list, without delegations",
    )
    etcd_bytes_a_request: float = _given(
        1000, BYTES, "of a transaction to each other member", "keys, record, Raft", estimate=True
    )
    lease_renewals_s: float = _given(
        5, SECONDS, "from renewal to renewal of a mount", "a third of the lease of 15 s", low=0.1
    )


@dataclass(frozen=True, slots=True)
class About:
    """One assumption, as it is listed."""

    group: str
    name: str
    value: float
    unit: Unit
    meaning: str
    source: str
    low: float
    high: float
    estimate: bool
    changed: bool

    def text(self) -> str:
        """The value with its unit."""
        return show(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """All four groups; values are checked where they are changed."""

    workload: Workload = field(default_factory=Workload)
    retention: Retention = field(default_factory=Retention)
    hardware: Hardware = field(default_factory=Hardware)
    services: Services = field(default_factory=Services)

    def listed(self) -> Iterator[About]:
        """Every assumption, in the order of the groups."""
        for group in dataclasses.fields(self):
            values = getattr(self, group.name)
            for one in dataclasses.fields(values):
                value = getattr(values, one.name)
                yield About(group.name, one.name, value, changed=value != one.default, **one.metadata)

    def changed(self, values: Mapping[str, float | str]) -> Assumptions:
        """Others in place of some; texts are read with their units. Raises UserError on a bad name or value."""
        known = {about.name: about for about in self.listed()}
        groups = {group.name: getattr(self, group.name) for group in dataclasses.fields(self)}
        for name, given in values.items():
            about = known.get(name) or known.get(f"{name}_s") or known.get(f"{name}_bytes")
            if about is None:
                near = get_close_matches(name, known, 1)
                raise UserError(
                    f"there is no assumption {name!r}" + (f": {near[0]}?" if near else "; --assumptions lists them")
                )
            # a number goes through the same check as a text: it may be no whole one, or no number at all
            value = parse(given if isinstance(given, str) else repr(given), about.unit)
            if not about.low <= value <= about.high:
                low, high = show(about.low, about.unit), show(about.high, about.unit)
                raise UserError(f"{about.name} is {show(value, about.unit)}: {low} to {high} is possible")
            groups[about.group] = dataclasses.replace(groups[about.group], **{about.name: value})
        return dataclasses.replace(self, **groups)
