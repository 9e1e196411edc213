"""Self-signed TLS certificates."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


def create_certificate(directory: Path, password: str | None = None) -> tuple[Path, Path]:
    """Create a self-signed certificate for localhost and its key, both PEM."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program is not installed")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", str(certificate), "-keyout", str(key)]
    command += ["-passout", f"pass:{password}"] if password else ["-nodes"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def client_ssl_context(certificate: Path) -> ssl.SSLContext:
    """Return the TLS context of a client that trusts this certificate only."""
    return ssl.create_default_context(cafile=str(certificate))
