"""What goes from site to site, and what the links between them must carry for it."""

from __future__ import annotations

from collections.abc import Iterator

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.fleet import Fleet, Link, in_order_of_size
from apollofs.fs.sizing.results import Flow, LinkPlan
from apollofs.fs.sizing.shapes import Shape, lead_of
from apollofs.fs.sizing.units import Unit, show, show_bits

WEIGHTS = "published weights"
SAVES = "copies of checkpoints"
DATASETS = "shared datasets"
METADATA = "metadata"


def receivers(shapes: list[Shape], given: Assumptions) -> list[Shape]:
    """The sites that published weights are copied to: every one with inference GPUs but the lead."""
    lead = lead_of(shapes)
    if not lead.weights_bytes or not given.workload.publishes_an_hour:
        return []
    return [shape for shape in shapes if shape.inference_gpus and shape.name != lead.name]


def copy_targets(source: Shape, shapes: list[Shape], given: Assumptions) -> list[str]:
    """The sites that get a copy of every Kth checkpoint of `source`: the largest others."""
    if not source.state_bytes or not given.retention.keep_every:
        return []
    others = [site.name for site in in_order_of_size([shape.site for shape in shapes]) if site.name != source.name]
    return others[: int(given.retention.save_copies)]


def flows_between(shapes: list[Shape], given: Assumptions, etcd_requests_s: float) -> Iterator[Flow]:
    """All of them; `etcd_requests_s` is the peak, of which every other site is told."""
    work, retention = given.workload, given.retention
    lead = lead_of(shapes)
    for shape in receivers(shapes, given):
        average = lead.weights_bytes * work.publishes_an_hour / 3600
        # where they come faster than a copy may take, copies follow each other without a pause
        yield Flow(lead.name, shape.name, WEIGHTS, max(average, lead.weights_bytes / work.publish_copy_s), average)
    for source in shapes:
        for target in copy_targets(source, shapes, given):
            average = source.state_bytes / (retention.keep_every * work.save_interval_s)
            yield Flow(source.name, target, SAVES, average, average)
    for shape in shapes:
        if shape.name == lead.name:
            continue
        new = work.dataset_shared * work.dataset_bytes_per_gpu * shape.training_gpus
        if new:
            yield Flow(lead.name, shape.name, DATASETS, new / work.run_s, new / work.run_s)
        told = etcd_requests_s * given.services.etcd_bytes_a_request
        yield Flow(lead.name, shape.name, METADATA, told, told)


def link_plans(fleet: Fleet, flows: list[Flow], given: Assumptions) -> Iterator[LinkPlan]:
    """One for each two sites between which something goes. Raises UserError where no link joins them."""
    for first, second in fleet.pairs():
        both = [flow for flow in flows if {flow.source, flow.target} == {first, second}]
        if both:
            yield _plan_of(fleet.link(first, second), both, given)


def _plan_of(link: Link, flows: list[Flow], given: Assumptions) -> LinkPlan:
    efficiency = given.services.link_efficiency
    ways = [[flow for flow in flows if flow.source == end] for end in (link.first, link.second)]
    peak = max(sum(flow.peak for flow in way) for way in ways) / efficiency
    average = max(sum(flow.average for flow in way) for way in ways) / efficiency
    weights = sum(flow.peak for flow in flows if flow.what == WEIGHTS) * given.workload.publish_copy_s
    return LinkPlan(link, tuple(flows), peak, average, weights / ((link.rate_bytes_s or peak) * efficiency))


def shortfalls_of(plans: list[LinkPlan], given: Assumptions) -> Iterator[str]:
    """A sentence for each thing that a link can't do."""
    allowed_s = given.workload.publish_copy_s
    for plan in plans:
        link = plan.link
        if not link.rate_bytes_s:
            continue
        between = f"the link {link.first},{link.second} carries {show_bits(link.rate_bytes_s)}"
        if plan.average > link.rate_bytes_s:
            yield f"{between} and needs {show_bits(plan.average)} on average: its backlog would grow for ever"
        elif plan.publish_s > allowed_s:
            late, allowed = show(plan.publish_s, Unit.SECONDS), show(allowed_s, Unit.SECONDS)
            yield f"{between}: published weights arrive after {late}, not {allowed}"
