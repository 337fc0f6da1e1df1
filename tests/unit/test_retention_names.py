"""What names of checkpoints, of what is unfinished, and of trackers say."""

from __future__ import annotations

import pytest

from apollofs.fs.retention.names import Steps, is_tracker, is_unfinished, means
from apollofs.fs.user_error import UserError

USUAL = {
    b"step1000": 1000,
    b"step_1000": 1000,
    b"step-1000.pt": 1000,
    b"checkpoint-1000": 1000,
    b"checkpoint_1000.pth": 1000,
    b"ckpt-7": 7,
    b"global_step1000": 1000,
    b"epoch=3-step=1000.ckpt": 1000,
    b"epoch=3-step=1000-v1.ckpt": 1000,
    b"epoch=3-val_loss=0.25-step=1000.ckpt": 1000,
    b"epoch=3.ckpt": 3,
    b"iter_0001000": 1000,
    b"model.ckpt-1000.index": 1000,
    b"ep1-ba2000-rank0.pt": 2000,
    b"model_step1000.pt": 1000,
    b"run7-step1000_rank3.pt": 1000,
}
OTHERS = (
    *(
        b"latest",
        b"last.ckpt",
        b"best.ckpt",
        b"config.json",
        b"1000",
        b"part-00001.parquet",
        b"steps1000",
        b"overstep10",
    ),
    *(b"step1000x", b"stepsize.txt", b"checkpoint", b"step" + b"9" * 30),
)


@pytest.mark.parametrize("name", USUAL)
def test_usual_names(name: bytes) -> None:
    found = Steps().find(name)
    assert found is not None and found[0] == USUAL[name]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_checkpoint(name: bytes) -> None:
    assert Steps().find(name) is None


def test_kinds_have_no_numbers() -> None:
    steps = Steps()

    def kind(name: bytes) -> bytes:
        found = steps.find(name)
        assert found is not None
        return found[1]

    assert kind(b"epoch=3-step=10.ckpt") == kind(b"epoch=12-step=2000.ckpt")
    assert kind(b"loss=-0.25-step=10.ckpt") == kind(b"loss=1e-5-step=20.ckpt")
    assert kind(b"step10_rank0.pt") == kind(b"step20_rank13.pt")
    assert kind(b"step10-a1b2") == kind(b"step20-c3d4") == kind(b"step30")
    assert len({kind(name) for name in (b"actor-step1.pt", b"critic-step1.pt", b"actor-step1.json", b"step1")}) == 4


def test_own_patterns() -> None:
    steps = Steps(["run*-{step}.pt", "w{step}"])
    assert steps.find(b"run5-100.pt") == (100, b"run#-#pt") == steps.find(b"run12-100.pt")
    assert steps.find(b"w042") == (42, b"w#")
    assert steps.find(b"step10") is None and steps.find(b"w1x") is None
    assert Steps(["*{step}.pt"]).find(b"model12.pt") == (12, b"model#pt")


@pytest.mark.parametrize("pattern", ["step", "{step}{step}", "a/{step}", "x" * 300 + "{step}"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(UserError, match="is no pattern"):
        Steps([pattern])
    with pytest.raises(UserError, match="at most 16"):
        Steps(["{step}"] * 17)


@pytest.mark.parametrize(
    "name",
    [b"step10.tmp", b"tmp-checkpoint-10", b"step10.pt.tmp.4711", b"step10.partial", b"step_10_incomplete", b"a.part"],
)
def test_unfinished(name: bytes) -> None:
    assert is_unfinished(name)


@pytest.mark.parametrize(
    "name", [b"step10", b"model.pt", b"template.json", b"attempt-3", b"part-1.bin", b"temperature.pt"]
)
def test_not_unfinished(name: bytes) -> None:
    assert not is_unfinished(name)


def test_trackers() -> None:
    names = (
        b"latest",
        b"latest_checkpointed_iteration.txt",
        b"last.ckpt",
        b"last_checkpoint",
        b"checkpoint",
        b"latest.txt",
    )
    assert all(is_tracker(name) for name in names)
    assert not any(is_tracker(name) for name in (b"best", b"latestx", b"checkpoint-10", b"lasting"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"global_step1000\n", [b"global_step1000"]),
        (b"1000", [b"iter_0001000"]),
        (b"/data/run/step1000/", [b"step1000"]),
        (b"epoch=3-step=1000.ckpt", [b"epoch=3-step=1000.ckpt"]),
        (b'model_checkpoint_path: "model.ckpt-1000"\n', [b"model.ckpt-1000.index", b"model.ckpt-1000.meta"]),
        (b'{"latest": "step1000"}', [b"step1000"]),
        (b"path=step1000", [b"step1000"]),
        (b"with space step1000", [b"with space step1000"]),
    ],
)
def test_what_trackers_mean(text: bytes, names: list[bytes]) -> None:
    assert means(text, 1000, names)
    assert not means(text.replace(b"1000", b"2000"), 1000, names)


def test_what_means_nothing() -> None:
    assert not means(b"release", 1000, [b"iter_0001000"])
    assert not means(b"", 1000, [b"step1000"])
    assert not means(b"1000 samples", 1000, [b"iter_0001000"])
    assert not means(b"9" * 10_000, 1000, [b"step1000"])
