"""What the fleet's names cost etcd: how many files, how large a database, how many transactions a second."""

from __future__ import annotations

import math
from collections.abc import Iterable

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.fleet import Fleet
from apollofs.fs.sizing.results import EtcdPlan, Space
from apollofs.fs.sizing.shapes import Shape, lead_of

MEMBERS = 3
MEMBERS_MANY = 5
SITES_MANY = 5
"""From so many sites on, five members: two of them may be lost."""


def files_a_save(shape: Shape, given: Assumptions) -> float:
    """One for each rank, and one that says what is where."""
    return shape.training_gpus * given.workload.ranks_per_gpu + 1 if shape.state_bytes else 0.0


def files_at(shape: Shape, space: Space, given: Assumptions) -> float:
    """Files that are made at this site and still there; a copy at another site is the same file."""
    work = given.workload
    saves = space.saves / shape.state_bytes * files_a_save(shape, given) if shape.state_bytes else 0.0
    return (
        saves
        + space.datasets / work.dataset_file_bytes
        + space.published / work.weights_file_bytes
        + space.scratch / work.scratch_file_bytes
    )


def peak_requests(shapes: list[Shape], given: Assumptions) -> float:
    """Transactions a second while every site saves, or all start again, as new weights are loaded. Without renewals."""
    work, services = given.workload, given.services
    total = 0.0
    for shape in shapes:
        training_nodes = shape.training_gpus / given.hardware.gpus_per_node
        loading_nodes = shape.inference_gpus / given.hardware.gpus_per_node
        save = files_a_save(shape, given) * services.requests_a_new_file / work.save_stall_s
        restore = training_nodes * services.requests_a_load / work.restore_s
        total += max(save, restore) + loading_nodes * services.requests_a_load / work.publish_load_s
    return total


def average_requests(shapes: list[Shape], given: Assumptions) -> float:
    """Transactions a second over days: making, removing, and finding what was published."""
    work, services = given.workload, given.services
    lead = lead_of(shapes)
    published = work.publishes_an_hour / 3600
    made = sum(files_a_save(shape, given) for shape in shapes) / work.save_interval_s
    made += lead.weights_bytes / work.weights_file_bytes * published
    loads = sum(shape.inference_gpus for shape in shapes) / given.hardware.gpus_per_node * published
    # each file that is made goes again, in one transaction
    return made * (services.requests_a_new_file + 1) + loads * services.requests_a_load


def plan_etcd(fleet: Fleet, shapes: list[Shape], spaces: Iterable[Space], given: Assumptions) -> EtcdPlan:
    """All of it. Volumes are as many as the larger of size and transactions asks for."""
    services = given.services
    files = sum(files_at(shape, space, given) for shape, space in zip(shapes, spaces, strict=True))
    peak, average = peak_requests(shapes, given), average_requests(shapes, given)
    renewals = sum(shape.nodes for shape in shapes) / services.lease_renewals_s
    history = average * services.etcd_compact_s * services.etcd_history_bytes
    database = files * services.etcd_bytes_a_file + history
    by_size = database / (services.etcd_quota_bytes * services.etcd_fill)
    by_rate = (peak + renewals) / services.etcd_requests_s
    members = MEMBERS_MANY if len(shapes) >= SITES_MANY else MEMBERS
    quorum_s = _quorum(fleet, lead_of(shapes).name, members)
    volumes = max(1, math.ceil(by_size), math.ceil(by_rate))
    return EtcdPlan(files, database, volumes, members, peak, average, renewals, quorum_s)


def _quorum(fleet: Fleet, lead: str, members: int) -> float | None:
    """With one or two sites the lead holds a majority itself; else each of the nearest sites holds one member."""
    if len(fleet.sites) < MEMBERS:
        return 0.0
    trips = [link.round_trip_s for link in fleet.links if lead in link.ends and link.round_trip_s is not None]
    needed = members // 2
    return sorted(trips)[needed - 1] if len(trips) >= needed else None
