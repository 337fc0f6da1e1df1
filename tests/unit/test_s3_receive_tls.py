"""Receiving whole objects over TLS: whose certificate is believed, and an end from outside."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apollofs.blobstore import BlobStoreRefused, BlobStoreUnavailable
from apollofs.blobstore.s3_options import S3Options
from apollofs.blobstore.s3_receive import Receiver
from tests.support.certificates import Certificates

BODY = os.urandom(1 << 20)


@dataclass
class Served:
    url: str
    certificates: Certificates
    half_sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    connections: int = 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """`/whole` is answered at once, `/half` with its second half when `go_on` is set; `/half-last` closes after it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            found.connections += 1

        def do_GET(self) -> None:
            self.send_response(206)
            self.send_header("Content-Length", str(len(BODY)))
            self.send_header("Content-Range", f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
            if self.path.startswith("/half-last"):
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(BODY[: len(BODY) // 2])
            if self.path.startswith("/half"):
                found.half_sent.set()
                found.go_on.wait(60)
            self.wfile.write(BODY[len(BODY) // 2 :])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Clients that go away, and that don't believe the certificate, are what this is for."""

    certificates = Certificates.made(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server_cert, certificates.server_key)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found = Served(f"https://127.0.0.1:{server.server_address[1]}", certificates)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def receiver(served: Served, ca_file: str | None) -> Receiver:
    return Receiver(lambda key: f"{served.url}/{key}?signed", S3Options(ca_file=ca_file))


def test_one_connection_serves_one_object_after_the_other(served: Served) -> None:
    receiving = receiver(served, served.certificates.ca)
    for _ in range(3):
        room = bytearray(len(BODY))
        receiving.begin().receive("whole", "read", memoryview(room))
        assert room == BODY
    receiving.close()
    assert served.connections == 1


@pytest.mark.parametrize("authority", ["other_ca", None])
def test_a_strange_certificate_is_refused(served: Served, authority: str | None) -> None:
    ca_file = getattr(served.certificates, authority) if authority else None
    with pytest.raises(BlobStoreRefused, match="certificate"):
        receiver(served, ca_file).begin().receive("whole", "read", memoryview(bytearray(len(BODY))))


@pytest.mark.parametrize("key", ["half", "half-last"])
def test_an_end_from_outside_is_noticed_at_once(served: Served, key: str) -> None:
    reception = receiver(served, served.certificates.ca).begin()

    def end() -> None:
        assert served.half_sent.wait(60)
        reception.abort()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(BlobStoreUnavailable) as caught:
        reception.receive(key, "read", memoryview(bytearray(len(BODY))))
    assert type(caught.value) is BlobStoreUnavailable, "it has not waited for the timeout"
    assert not served.go_on.is_set()
    ending.join()


def test_what_was_given_up_is_not_begun(served: Served) -> None:
    reception = receiver(served, served.certificates.ca).begin()
    reception.abort()
    with pytest.raises(BlobStoreUnavailable):
        reception.receive("whole", "read", memoryview(bytearray(len(BODY))))
