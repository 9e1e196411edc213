"""Key pairs for signatures, as PEM files. Tests that need model-signing skip without it."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest


class KeyPair(NamedTuple):
    """The files of a private and a public key."""

    private: Path
    public: Path


def create_key_pair(directory: Path, name: str = "key", kind: str = "P-256", password: str | None = None) -> KeyPair:
    """Write a key pair; the kind is P-256, P-384, secp256k1, RSA or Ed25519."""
    pytest.importorskip("model_signing", reason="model-signing or pyOpenSSL is not installed", exc_type=ImportError)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key: Any
    if kind == "RSA":
        key = rsa.generate_private_key(65537, 2048)
    elif kind == "Ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = ec.generate_private_key({"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}.get(kind) or ec.SECP256K1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pair = KeyPair(directory / f"{name}.pem", directory / f"{name}.public.pem")
    pair.private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    pair.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return pair
