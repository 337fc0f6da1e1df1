"""What follows from a site's GPUs alone: who trains, who serves, how large the model is, how often it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apollofs.fs.sizing.assumptions import DAY_S, Assumptions
from apollofs.fs.sizing.fleet import Fleet, Site
from apollofs.fs.sizing.units import Unit, show
from apollofs.fs.user_error import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """A site in numbers. `state_bytes` is one checkpoint; `weights_bytes` is what it would publish."""

    site: Site
    training_gpus: int
    inference_gpus: int
    nodes: int
    params: float
    weights_bytes: float
    state_bytes: float
    failures_a_day: float

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def failure_interval_s(self) -> float:
        """Mean time between failures of this site's training; infinite where nothing trains or fails."""
        return DAY_S / self.failures_a_day if self.failures_a_day else math.inf


def shape_of(site: Site, given: Assumptions) -> Shape:
    """Raises UserError where the model can't be in the GPUs that train it, or fails faster than it starts."""
    work, hardware = given.workload, given.hardware
    share = work.inference_share if site.inference_share is None else site.inference_share
    inference = math.floor(site.gpus * share + 0.5)
    training = site.gpus - inference
    params = work.params or work.params_per_gpu * training
    weights = params * work.weight_bytes_per_param
    state = (weights + params * work.optimizer_bytes_per_param) if training else 0.0
    failures = (work.failures_a_day or work.failures_per_gpu_day * training) if training else 0.0
    shape = Shape(
        site, training, inference, math.ceil(site.gpus / hardware.gpus_per_node), params, weights, state, failures
    )
    _check(shape, given)
    return shape


def lead_of(shapes: list[Shape]) -> Shape:
    """The site whose weights are published: the one with most training GPUs, the first of equals."""
    return max(shapes, key=lambda shape: shape.training_gpus)


def shapes_of(fleet: Fleet, given: Assumptions) -> list[Shape]:
    """All sites. Raises UserError where published weights would not fit into a site's inference GPUs."""
    shapes = [shape_of(site, given) for site in fleet.sites]
    weights = lead_of(shapes).weights_bytes if given.workload.publishes_an_hour else 0.0
    room = given.hardware.gpu_memory_bytes * given.workload.memory_for_weights
    for shape in shapes:
        if shape.inference_gpus and weights > shape.inference_gpus * room:
            needed = f"{math.ceil(weights / room):,} inference GPUs"
            size = show(weights, Unit.BYTES)
            raise UserError(f"{shape.name}: weights of {size} need {needed}, and it has {shape.inference_gpus:,}")
    return shapes


def _check(shape: Shape, given: Assumptions) -> None:
    work = given.workload
    if work.save_stall_s >= work.save_interval_s:
        raise UserError(
            f"a checkpoint may take {show(work.save_stall_s, Unit.SECONDS)} and the next one begins after "
            f"{show(work.save_interval_s, Unit.SECONDS)}: nothing would be trained"
        )
    memory = shape.training_gpus * given.hardware.gpu_memory_bytes
    if shape.state_bytes > memory:
        raise UserError(
            f"{shape.name}: a training state of {show(shape.state_bytes, Unit.BYTES)} can't be in the "
            f"{show(memory, Unit.BYTES)} of {shape.training_gpus:,} training GPUs"
        )
    down_s = work.restart_s + work.restore_s
    if shape.failure_interval_s <= down_s:
        raise UserError(
            f"{shape.name}: training fails every {show(shape.failure_interval_s, Unit.SECONDS)} and needs "
            f"{show(down_s, Unit.SECONDS)} to start again: nothing would be trained"
        )
