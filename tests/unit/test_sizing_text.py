"""Sizing as people meet it: numbers with units, TOML, the command, its pictures, and the example in the documents."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.fs.cli import main
from apollofs.fs.sizing import Assumptions, read_input
from apollofs.fs.sizing.fleet import Link, Site
from apollofs.fs.sizing.report import assumptions_text
from apollofs.fs.sizing.units import Unit, parse, show, show_bits, show_count, show_time
from apollofs.fs.user_error import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "SIZING.md"
PNG = b"\x89PNG\r\n\x1a\n"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`apollofs plan` with these words: status, output, errors."""

    def call(*words: object) -> tuple[int, str, str]:
        status = main(["plan", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# -- units


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("8192", Unit.COUNT, 8192),
        ("8,192", Unit.WHOLE, 8192),
        ("405B", Unit.COUNT, 405e9),
        ("2T", Unit.COUNT, 2e12),
        ("250M", Unit.COUNT, 250e6),
        ("1e3", Unit.WHOLE, 1000),
        ("500 GB", Unit.BYTES, 500e9),
        ("15.36TB", Unit.BYTES, 15.36e12),
        ("8MiB", Unit.BYTES, 8 << 20),
        ("12", Unit.BYTES, 12),
        ("400Gbit/s", Unit.BYTES_S, 50e9),
        ("400Gb/s", Unit.BYTES_S, 50e9),
        ("100Gbps", Unit.BYTES_S, 12.5e9),
        ("2.5GB/s", Unit.BYTES_S, 2.5e9),
        ("1GiB/s", Unit.BYTES_S, 1 << 30),
        ("15m", Unit.SECONDS, 900),
        ("90d", Unit.SECONDS, 90 * 86_400),
        ("12ms", Unit.SECONDS, 0.012),
        ("1.5h", Unit.SECONDS, 5400),
        ("25%", Unit.SHARE, 0.25),
        (".25", Unit.SHARE, 0.25),
    ],
)
def test_numbers_are_read_with_their_units(text: str, unit: Unit, value: float) -> None:
    assert parse(text, unit) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", Unit.COUNT),
        ("many", Unit.COUNT),
        ("-1", Unit.COUNT),
        ("nan", Unit.COUNT),
        ("1e999", Unit.COUNT),
        ("0.5", Unit.WHOLE),
        ("5 GB/s", Unit.BYTES),
        ("5 GB", Unit.BYTES_S),
        ("5 parsec/s", Unit.BYTES_S),
        ("15 GB", Unit.SECONDS),
        ("3 s", Unit.SHARE),
    ],
)
def test_what_is_no_number_of_its_unit_is_refused(text: str, unit: Unit) -> None:
    with pytest.raises(UserError):
        parse(text, unit)


def test_numbers_are_shown_in_three_digits() -> None:
    assert [show(value, Unit.BYTES) for value in (0, 999, 1000, 999_499, 999_500, 2.4742e12, 117.8e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "999 kB",
        "1 MB",
        "2.47 TB",
        "118 PB",
    ]
    assert [show_time(seconds) for seconds in (0, 0.012, 15, 60, 90, 5400, 3600, 86_400, 90 * 86_400)] == [
        "0 s",
        "12 ms",
        "15 s",
        "1 min",
        "90 s",
        "90 min",
        "1 h",
        "1 d",
        "90 d",
    ]
    assert [show_count(value) for value in (8192, 2.5, 999_999, 405e9, 1.536e12)] == [
        "8,192",
        "2.5",
        "999,999",
        "405 B",
        "1.54 T",
    ]
    assert show_bits(12.5e9) == "100 Gbit/s"
    assert show(0.25, Unit.SHARE) == "25 %"


@given(value=st.floats(1e-3, 1e20), unit=st.sampled_from([Unit.BYTES, Unit.BYTES_S, Unit.SECONDS, Unit.COUNT]))
def test_what_is_shown_reads_as_what_it_was(value: float, unit: Unit) -> None:
    small = unit in (Unit.BYTES, Unit.BYTES_S) and value < 1
    assert parse(show(value, unit), unit) == pytest.approx(value, rel=0.5 if small else 6e-3, abs=1e-3)


# -- TOML


def test_a_file_with_everything() -> None:
    found = read_input("""
        [[site]]
        name = "north"
        gpus = 4000
        inference = "50%"
        [[site]]
        name = "south"
        gpus = "8k"
        [[link]]
        between = ["north", "south"]
        rate = "100Gbit/s"
        round_trip = "12ms"
        [workload]
        save_interval = "30m"
        publishes_an_hour = 4
        [hardware]
        drive_bytes = "30.72TB"
    """)
    assert found.sites == (Site("north", 4000, 0.5), Site("south", 8000))
    assert found.links == (Link("north", "south", 12.5e9, 0.012),)
    values = Assumptions().changed(found.values)
    assert (values.workload.save_interval_s, values.workload.publishes_an_hour) == (1800, 4)
    assert values.hardware.drive_bytes == 30.72e12
    assert read_input("gpus = 8192").sites == (Site("here", 8192),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpus = ", "is no TOML"),
        ("gpu = 8", "there is no 'gpu'"),
        ("gpus = true", "is no whole number"),
        ("gpus = 8\n[[site]]\nname = 'a'\ngpus = 8", "not both"),
        ("[workload]\nparam = 8", "there is no 'param' in"),
        ("[hardware]\nparams = 8", "there is no 'params' in"),
        ("[workload]\nparams = [8]", "is no number"),
        ("workload = 8", "is a table"),
        ("site = 8", "a table of its own"),
        ("[[site]]\ngpus = 8", "needs a name"),
        ("[[site]]\nname = 'a'\ngpus = 8\ncolour = 1", "there is no 'colour'"),
        ("[[link]]\nbetween = ['a']", "needs between"),
        ("[[link]]\nbetween = ['a', 'b']\nrate = '5 GB'", "is no rate"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_input(text)


# -- the command


def test_the_plan_as_text_and_as_json(run: Run) -> None:
    status, out, err = run("--gpus", 8192)
    assert (status, err) == (0, "")
    assert out.startswith("8,192 GPUs at 1 site: 120 racks of GPUs, 2.47 TB/s\n")
    status, out, _ = run("--gpus", 8192, "--json")
    data = json.loads(out)
    assert (status, data["totals"]["gpu_racks"]) == (0, 120)
    assert data["sites"]["here"]["throughput"]["available"] == pytest.approx(2.474e12, rel=1e-3)
    assert data["assumptions"]["save_interval_s"] == 900


def test_what_does_not_train_or_fail_has_no_rhythm(run: Run) -> None:
    _, out, _ = run("--gpus", 16, "--inference-share", "100%", "--params", "7B", "--simulate", "--days", 1)
    assert re.search(r"^best checkpoint interval +-$", out, re.MULTILINE)
    assert re.search(r"^time that training used well +-$", out, re.MULTILINE)
    assert "287 publishes" in out
    data = json.loads(run("--gpus", 1, "--set", "failures_per_gpu_day=0", "--json")[1])
    assert data["sites"]["here"]["rhythm"]["best_interval_s"] is None


def test_options_come_before_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("gpus = 4096\n[workload]\nsave_interval = '30m'\nsave_stall = '20s'\n")
    _, out, _ = run("--input", file, "--json", "--save-stall", "10s", "--set", "drive_bytes=30TB")
    data = json.loads(out)
    assert data["totals"]["gpus"] == 4096
    assert [data["assumptions"][name] for name in ("save_interval_s", "save_stall_s", "drive_bytes")] == [
        1800,
        10,
        30e12,
    ]
    _, out, _ = run("--input", file, "--gpus", "8k", "--json")
    assert json.loads(out)["totals"]["gpus"] == 8000


def test_a_link_that_is_too_slow_is_a_failure(run: Run) -> None:
    words = ("--site", "north=4000,inference=50%", "--site", "south=8000")
    status, out, _ = run(*words, "--link", "north,south=100Gbit/s,12ms")
    assert status == 1
    assert "\nCAN'T BE MET: the link north,south carries 100 Gbit/s" in out
    assert run(*words)[0] == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ((), 1, "no GPU to plan for"),
        (("--gpus", "lots"), 1, "is no whole number"),
        (("--gpus", "8", "--site", "a=8"), 2, "--gpus is for one site"),
        (("--gpus", "8", "--plots", "x"), 2, "--simulate"),
        (("--gpus", "8", "--set", "params"), 1, "NAME=VALUE"),
        (("--gpus", "8", "--set", "parans=1"), 1, "params?"),
        (("--gpus", "8", "--params", "2T"), 1, "can't be in the"),
        (("--gpus", "8", "--simulate", "--days", "0"), 1, "can't be played"),
        (("--input", "/no/such/file"), 1, "/no/such/file: No such file"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: tuple[str, ...], status: int, said: str) -> None:
    found, out, err = run(*words)
    assert (found, out) == (status, "")
    assert err.startswith("apollofs: ")
    assert err.count("\n") == 1
    assert said in err


def test_assumptions_are_listed_with_their_sources(run: Run) -> None:
    status, out, _ = run("--assumptions", "--save-interval", "30m")
    assert status == 0
    assert re.search(r"^! save_interval_s +30 min", out, re.MULTILINE)
    assert "The Llama 3 Herd of Models" in out
    listed = json.loads(run("--assumptions", "--json")[1])
    assert {"name", "value", "unit", "source", "estimate", "low", "high"} <= set(listed[0])


def test_days_are_played_and_drawn(run: Run, tmp_path: Path) -> None:
    pictures = tmp_path / "plots"
    words = ("--site", "a=512", "--site", "b=256", "--simulate", "--days", 2, "--seed", 4)
    status, out, _ = run(*words, "--plots", pictures)
    assert status == 0
    assert "played 2 days with seed 4" in out
    assert sorted(path.name for path in pictures.iterdir()) == ["lag.png", "space.png", "throughput.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in pictures.iterdir())
    data = json.loads(run(*words, "--json")[1])
    assert data["played"]["sites"]["a"]["written"] > 0
    assert data["plots"] == []


def test_without_matplotlib_a_plot_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    words = ("--gpus", 64, "--simulate", "--days", 1)
    status, _, err = run(*words, "--plots", tmp_path / "plots")
    assert status == 1
    assert "pip install 'apollofs[plan]'" in err
    assert run(*words)[0] == 0


# -- the document


def test_the_example_in_the_document_is_what_the_command_prints(run: Run) -> None:
    examples = re.findall(r"```console\n\$ apollofs plan (.*)\n((?s:.*?))```", DOCUMENT.read_text())
    assert len(examples) == 2
    for words, text in examples:
        assert run(*words.split())[1] == text


def test_the_document_has_every_assumption() -> None:
    text = DOCUMENT.read_text()
    assert assumptions_text(Assumptions()) in text
