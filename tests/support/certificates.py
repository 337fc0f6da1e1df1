"""Certificates for servers and clients on loopback, made with the openssl command; valid for a day."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 30.0
SERVER_NAMES = "subjectAltName=IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of PEM files. The server's and the client's certificates are signed by `ca`; `other_ca` signed neither."""

    ca: str
    other_ca: str
    server_cert: str
    server_key: str
    client_cert: str
    client_key: str

    @classmethod
    def made(cls, directory: Path) -> Certificates:
        """New ones, in `directory`."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("ca", "other"):
            _openssl(directory, *_request(name), "-x509", "-days", "1", "-out", f"{name}.pem")
        _signed(directory, "server", SERVER_NAMES, "extendedKeyUsage=serverAuth,clientAuth")
        _signed(directory, "client", "extendedKeyUsage=clientAuth")
        names = ("ca.pem", "other.pem", "server.pem", "server.key", "client.pem", "client.key")
        return cls(*(str(directory / name) for name in names))


def _request(name: str) -> list[str]:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    return ["req", *key, "-subj", f"/CN=apollofs test {name}"]


def _signed(directory: Path, name: str, *extensions: str) -> None:
    (directory / f"{name}.ext").write_text("\n".join(extensions) + "\n")
    _openssl(directory, *_request(name), "-out", f"{name}.csr")
    issuer = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    extra = ["-days", "1", "-extfile", f"{name}.ext"]
    _openssl(directory, "x509", "-req", "-in", f"{name}.csr", *issuer, *extra, "-out", f"{name}.pem")


def _openssl(directory: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr[-800:]}")
