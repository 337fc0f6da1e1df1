"""The formulas of a site, and all of them put together. Each line of arithmetic is explained in `docs/SIZING.md`."""

from __future__ import annotations

import math

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.crossing import METADATA, copy_targets, flows_between, link_plans, receivers, shortfalls_of
from apollofs.fs.sizing.fleet import Fleet
from apollofs.fs.sizing.metadata_load import peak_requests, plan_etcd
from apollofs.fs.sizing.results import Flow, Machines, NodeLoad, Plan, Rhythm, SitePlan, Space, Throughput
from apollofs.fs.sizing.retaining import Policy
from apollofs.fs.sizing.shapes import Shape, lead_of, shapes_of
from apollofs.fs.sizing.units import Unit, show
from apollofs.fs.user_error import UserError


def make_plan(fleet: Fleet, given: Assumptions | None = None) -> Plan:
    """The whole plan. Raises UserError where no purchase would do what is asked, and says why."""
    given = given or Assumptions()
    shapes = shapes_of(fleet, given)
    flows = list(flows_between(shapes, given, peak_requests(shapes, given)))
    spaces = [space_of(shape, shapes, given) for shape in shapes]
    lead = lead_of(shapes)
    sites = tuple(
        _site_plan(shape, space, lead.weights_bytes, flows, given) for shape, space in zip(shapes, spaces, strict=True)
    )
    links = list(link_plans(fleet, flows, given))
    etcd = plan_etcd(fleet, shapes, spaces, given)
    return Plan(fleet, given, sites, tuple(links), etcd, lead.name, tuple(shortfalls_of(links, given)))


def save_policy(given: Assumptions) -> Policy:
    """What stays of a site's own checkpoints."""
    retention = given.retention
    return Policy(int(retention.keep_last), int(retention.keep_every), retention.keep_for_s)


def copy_policy(given: Assumptions) -> Policy:
    """What stays of the copies at other sites: they are of every Kth only, and as old."""
    return Policy(1, 1, given.retention.keep_for_s)


def publish_policy(given: Assumptions) -> Policy:
    """What stays of published weights: the newest, whatever its age, and all that are young enough."""
    return Policy(1, 1, given.workload.publish_kept_s)


def waiting_s(given: Assumptions) -> float:
    """The longest that something lies there in vain: until a clean-up drops it, its grace, and one more clean-up."""
    return 2 * given.retention.gc_interval_s + given.retention.gc_grace_s


def space_of(shape: Shape, shapes: list[Shape], given: Assumptions) -> Space:
    """What lies at a site in the steady state, at most."""
    work, retention, hardware = given.workload, given.retention, given.hardware
    lead = lead_of(shapes)
    keepers = [lead, *receivers(shapes, given)] if work.publishes_an_hour else []
    published = written = 0.0
    if shape.name in [keeper.name for keeper in keepers]:
        written = lead.weights_bytes * work.publishes_an_hour / 3600
        published = publish_policy(given).most(3600 / work.publishes_an_hour) * lead.weights_bytes
    copies = 0.0
    for source in shapes:
        if shape.name in copy_targets(source, shapes, given):
            apart_s = work.save_interval_s * retention.keep_every
            copies += copy_policy(given).most(apart_s) * source.state_bytes
            written += source.state_bytes / apart_s
    saves = save_policy(given).most(work.save_interval_s) * shape.state_bytes
    written += shape.state_bytes / work.save_interval_s
    # one checkpoint is under way, and what a failure has cut short lies there too
    cut_short = shape.failures_a_day / 86_400 * waiting_s(given) * work.save_stall_s / work.save_interval_s
    waiting = written * waiting_s(given) + shape.state_bytes * (1 + cut_short)
    datasets = work.dataset_bytes_per_gpu * shape.training_gpus
    scratch = work.scratch_bytes_per_gpu * shape.site.gpus
    raw_factor = (hardware.data_shards + hardware.parity_shards) / hardware.data_shards
    return Space(datasets, saves, copies, published, scratch, waiting, hardware.fill_limit, raw_factor)


def _site_plan(shape: Shape, space: Space, weights: float, flows: list[Flow], given: Assumptions) -> SitePlan:
    throughput = _throughput(shape, space, weights, flows, given)
    node = _node_load(shape, throughput, given)
    machines = _machines(shape, throughput, space, given)
    requests_s = throughput.available / given.services.block_bytes
    return SitePlan(shape, throughput, space, _rhythm(shape, given), node, machines, requests_s)


def loaded_bytes(shape: Shape, weights: float, given: Assumptions) -> float:
    """What a site reads when new weights of this size are published: a copy for every group of GPUs that holds one."""
    room = given.hardware.gpu_memory_bytes * given.workload.memory_for_weights
    return shape.inference_gpus * min(weights, room) if given.workload.publishes_an_hour else 0.0


def _throughput(shape: Shape, space: Space, weights: float, flows: list[Flow], given: Assumptions) -> Throughput:
    work = given.workload
    bodies = [flow for flow in flows if flow.what != METADATA]
    return Throughput(
        save=shape.state_bytes / work.save_stall_s,
        restore=shape.state_bytes * work.restore_copies / work.restore_s,
        dataset=space.datasets * work.dataset_passes / work.run_s,
        load=loaded_bytes(shape, weights, given) / work.publish_load_s,
        arriving=sum(flow.peak for flow in bodies if flow.target == shape.name),
        leaving=sum(flow.peak for flow in bodies if flow.source == shape.name),
        efficiency=given.services.store_efficiency,
    )


def _rhythm(shape: Shape, given: Assumptions) -> Rhythm:
    """Young's optimum, and the share of time that is left: J. W. Young, CACM 17(9), 1974."""
    work = given.workload
    between_s = shape.failure_interval_s
    lost_s = work.save_interval_s / 2 + work.restart_s + work.restore_s
    goodput = (1 - work.save_stall_s / work.save_interval_s) * max(0.0, 1 - lost_s / between_s)
    return Rhythm(math.sqrt(2 * work.save_stall_s * between_s), goodput if shape.training_gpus else 0.0)


def _node_load(shape: Shape, throughput: Throughput, given: Assumptions) -> NodeLoad:
    """Raises UserError where a node's network or disk is too small for its share."""
    work, hardware = given.workload, given.hardware
    training = max(1.0, shape.training_gpus / hardware.gpus_per_node)
    serving = max(1.0, shape.inference_gpus / hardware.gpus_per_node)
    save, load = throughput.save / training, throughput.load / serving
    restore = throughput.restore / training
    fastest = max(save, load, restore)
    if fastest > hardware.node_network_bytes_s:
        what, knob = max(
            (save, ("save", "save_stall_s")), (load, ("load", "publish_load_s")), (restore, ("read", "restore_s"))
        )[1]
        needed_s = getattr(work, knob) * fastest / hardware.node_network_bytes_s
        raise UserError(
            f"{shape.name}: a node would have to {what} {show(fastest, Unit.BYTES_S)}, and its network carries "
            f"{show(hardware.node_network_bytes_s, Unit.BYTES_S)}: {knob} must be at least "
            f"{show(needed_s, Unit.SECONDS)}"
        )
    disk = 2 * shape.state_bytes / training
    if shape.inference_gpus:
        disk = max(disk, 2 * throughput.load * work.publish_load_s / serving)
    if disk > hardware.node_disk_bytes:
        raise UserError(
            f"{shape.name}: a node needs {show(disk, Unit.BYTES)} of local disk for two checkpoints or two sets of "
            f"weights, and has {show(hardware.node_disk_bytes, Unit.BYTES)}"
        )
    return NodeLoad(save, load, fastest / 1e9 * given.services.client_cpu_s_a_gb, disk)


def _machines(shape: Shape, throughput: Throughput, space: Space, given: Assumptions) -> Machines:
    hardware = given.hardware
    reasons = {
        "space": space.raw / (hardware.server_drives * hardware.drive_bytes),
        "reads": throughput.reads / hardware.server_read_bytes_s,
        "writes": throughput.writes / hardware.server_write_bytes_s,
        "shards": hardware.data_shards + hardware.parity_shards,
    }
    limit = max(reasons, key=lambda reason: reasons[reason])
    servers = math.ceil(reasons[limit])
    units = math.ceil(shape.site.gpus / (hardware.gpus_per_rack * hardware.racks_per_unit))
    gateways = max(2, math.ceil(throughput.available / hardware.gateway_bytes_s * (1 + hardware.gateway_spare)))
    racks = math.ceil(servers / hardware.servers_per_rack)
    return Machines(int(units * hardware.racks_per_unit), servers, racks, gateways, limit)
