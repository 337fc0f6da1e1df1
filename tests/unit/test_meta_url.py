"""META_URL: what parses to what, what does not, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.fs.meta_url import BadMetaURL, Endpoint, MetaURL, parse_meta_url, resolve_password
from apollofs.fs.user_error import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("etcd://host/vol", MetaURL((Endpoint("host", 2379),), "vol")),
        ("etcd://a:1,b:2,c/vol/", MetaURL((Endpoint("a", 1), Endpoint("b", 2), Endpoint("c", 2379)), "vol")),
        ("etcd://[::1]:2379,[fe80::1]/v", MetaURL((Endpoint("::1", 2379), Endpoint("fe80::1", 2379)), "v")),
        ("etcds://host/vol", MetaURL((Endpoint("host", 2379),), "vol", tls=True)),
        ("etcd://host/vol?ca=/etc/ca.pem", MetaURL((Endpoint("host", 2379),), "vol", tls=True, ca_file="/etc/ca.pem")),
        (
            "etcds://me@host/vol?ca=/ca&cert=/c%20d&key=/k&password-file=/p",
            MetaURL((Endpoint("host", 2379),), "vol", "me", "/p", True, "/ca", "/c d", "/k"),
        ),
        ("etcd://m%40e@host/vol", MetaURL((Endpoint("host", 2379),), "vol", "m@e")),
    ],
)
def test_what_parses(text: str, expected: MetaURL) -> None:
    assert parse_meta_url(text) == expected
    assert parse_meta_url(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:2379/vol",
        "http://host/vol",
        "etcd:/host/vol",
        "etcd://",
        "etcd:///vol",
        "etcd://host",
        "etcd://host/",
        "etcd://host/a/b",
        "etcd://host/.vol",
        "etcd://host/" + "v" * 65,
        "etcd://host:0/vol",
        "etcd://host:65536/vol",
        "etcd://host:/vol",
        "etcd://host:²/vol",
        "etcd://ho st/vol",
        "etcd://a,,b/vol",
        "etcd://a,a/vol",
        "etcd://@host/vol",
        "etcd://host/vol#part",
        "etcd://host/vol?ca=relative",
        "etcd://host/vol?ca=/a&ca=/b",
        "etcd://host/vol?unknown=1",
        "etcd://host/vol?cert=/c",
        "etcd://host/vol?key=/k",
        "etcd://host/vol?password-file=/p",
        "etcd://" + ",".join(f"h{n}" for n in range(33)) + "/vol",
    ],
)
def test_what_does_not_parse_shows_a_good_url_in_one_line(text: str) -> None:
    with pytest.raises(BadMetaURL) as caught:
        parse_meta_url(text)
    assert "etcd://host1:2379,host2:2379/volume" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "etcd://me:hunter2@host/vol",
        "etcd://me:hunter2/x@host/vol",
        "etcd://me@host/vol?password=hunter2",
        "http://me:hunter2@host/vol",
    ],
)
def test_a_password_is_refused_and_never_shown(text: str) -> None:
    with pytest.raises(BadMetaURL) as caught:
        parse_meta_url(text)
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for candidate in (text, f"etcd://{text}", f"etcd://host/{text}", f"etcd://host/vol?{text}"):
        try:
            url = parse_meta_url(candidate)
        except BadMetaURL:
            continue
        assert parse_meta_url(str(url)) == url


class TestPassword:
    URL = parse_meta_url("etcd://me@host/vol")

    def test_from_the_environment(self) -> None:
        access = resolve_password(self.URL, "hunter2")
        assert access.password == "hunter2"
        assert "hunter2" not in repr(access)

    def test_from_a_file_before_the_environment(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("from file\n")
        assert resolve_password(self.URL, "other", str(tmp_path / "secret")).password == "from file"
        named = parse_meta_url(f"etcd://me@host/vol?password-file={tmp_path}/secret")
        assert resolve_password(named, "").password == "from file"

    def test_no_user_needs_none(self) -> None:
        assert resolve_password(parse_meta_url("etcd://host/vol"), "ignored").password == ""

    @pytest.mark.parametrize("content", [b"", b"\n", b"x" * 5000, b"\xff\xfe"])
    def test_a_file_that_holds_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "secret").write_bytes(content)
        with pytest.raises(UserError, match="password file"):
            resolve_password(self.URL, "", str(tmp_path / "secret"))

    def test_a_file_that_is_missing_or_nothing_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="can't be read: No such file"):
            resolve_password(self.URL, "", str(tmp_path / "missing"))
        with pytest.raises(UserError, match="APOLLOFS_ETCD_PASSWORD"):
            resolve_password(self.URL, "")

    def test_a_file_without_a_user(self, tmp_path: Path) -> None:
        with pytest.raises(BadMetaURL, match="needs a user"):
            resolve_password(parse_meta_url("etcd://host/vol"), "", str(tmp_path / "secret"))
