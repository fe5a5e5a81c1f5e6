"""Certificates for tests of TLS: the machine has none that a test could use."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def certificate_in(folder: Path) -> Path:
    """Return a file with a key and a certificate for 127.0.0.1 that nobody but itself has signed."""
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1")
    files = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem")
    subprocess.run([*made, *files], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return both


def serves_with(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
