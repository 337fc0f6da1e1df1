"""`changes --kafka`: what is said of options and files that can't be right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apollofs.fs.change_kafka import KafkaTarget, open_kafka
from apollofs.fs.cli.app import main
from apollofs.fs.kafka_settings import RESERVED, read_settings
from apollofs.fs.user_error import UserError

URL = "etcd://127.0.0.1:1/volume"
SECRET = "not-to-be-shown"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a wrong use."""
    assert main(["changes", URL, *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kafka", "k:9092"), "--kafka needs --topic"),
        (("--topic", "t"), "belong to --kafka"),
        (("--kafka-config", "file"), "belong to --kafka"),
        (("--kafka", "k:9092", "--topic", "a/b"), "'a/b' is no topic"),
        (("--kafka", "k:9092", "--topic", "t", "--kafka-timeout", "1h"), "from 1 s to 10m"),
        (("--kafka", "k:9092", "--topic", "t", "--kafka-timeout", "0"), "from 1 s to 10m"),
    ],
)
def test_wrong_uses(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, *words)


def test_without_the_client_library_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "apollofs.fs.change_kafka", raising=False)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    assert "pip install 'apollofs[kafka]'" in refused(capsys, "--kafka", "k:9092", "--topic", "t")


def test_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "kafka.properties"
    path.write_text(f"# comment\n! another\n\nsecurity.protocol=SASL_SSL\n sasl.password = {SECRET}=\n")
    assert read_settings(str(path)) == {"security.protocol": "SASL_SSL", "sasl.password": f"{SECRET}="}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"a=b\n{SECRET}", "line 2: it should be name=value"),
        (f"sasl password={SECRET}", "line 1: it should be name=value"),
        (f"a={SECRET}\na={SECRET}", "line 2: a stands there twice"),
        *((f"{name}={SECRET}", f"{name} can't be set") for name in RESERVED),
        (f"a={SECRET}\n" * 10_000, "larger than"),
        (SECRET + "\udcff", "not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "kafka.properties"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=said) as caught:
        read_settings(str(path))
    assert SECRET not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read: No such file"):
        read_settings(str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["security.protocol", "sasl.pasword"])
async def test_settings_that_the_client_refuses(name: str) -> None:
    target = KafkaTarget("127.0.0.1:1", "t", "name", {name: SECRET})
    with pytest.raises(UserError, match=name) as caught:
        async with open_kafka(target, lambda record: b""):
            pass
    assert SECRET not in str(caught.value) + repr(target)
