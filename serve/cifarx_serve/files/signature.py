"""Signatures of artifacts with key pairs, in the format of OpenSSF's model-signing: X.onnx is signed by X.onnx.sig.

A signature is a Sigstore bundle that signs the SHA-256 of the file, or of every file of a folder. The name of the
artifact is not signed, and nothing is looked up on a network.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cifarx_serve.errors import ModelFileError, UsageError, error_message
from cifarx_serve.files.atomic import atomic_path
from cifarx_serve.files.regular_file import read_regular_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SUFFIX: Final = ".sig"

_CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")
"""The curves that model-signing takes: P-256, P-384 and P-521."""

_CREATE_KEY: Final = "create a key with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
_MAX_KEY_BYTES: Final = 1 << 16
_MAX_SIGNATURE_BYTES: Final = 1 << 24


class SignatureError(ModelFileError):
    """Raised when an artifact has no valid signature."""


def signature_path(artifact: Path) -> Path:
    """Return the path of the signature of an artifact, a file or a folder."""
    artifact = artifact.absolute()
    return artifact.with_name(artifact.name + SUFFIX)


class Signer:
    """Signs artifacts.

    Args:
        private_key: a PEM file with the private key, which is on the curve P-256, P-384 or P-521 and has no password.

    Raises:
        UsageError: the file has no such key, or model-signing is not installed.
    """

    def __init__(self, private_key: Path) -> None:
        signing = _import("signing")
        _load_private_key(private_key)
        self._config = signing.Config().use_elliptic_key_signer(private_key=private_key)

    def sign(self, artifact: Path) -> Path:
        """Write the signature of an artifact next to it, and return its path.

        Raises:
            SignatureError: the artifact cannot be read.
            OutputError: the signature cannot be written.
        """
        target = signature_path(artifact)
        with atomic_path(target) as temporary:
            try:
                self._config.sign(artifact.resolve(), temporary)
            except ValueError as error:  # a symbolic link in a folder, or a file that is neither regular nor a folder
                raise SignatureError(f"cannot sign {artifact} ({error_message(error)})", "export it again") from error
        return target


class Verifier:
    """Verifies the signatures of artifacts.

    Args:
        public_key: a PEM file with the public key of the pair.

    Raises:
        UsageError: the file has no such key, or model-signing is not installed.
    """

    def __init__(self, public_key: Path) -> None:
        self._verifying = _import("verifying")
        self._key_file = public_key
        self._key_id = _key_id(_load_public_key(public_key))

    def verify(self, artifact: Path) -> None:
        """Check that an artifact was signed with the private key of the pair, and has not changed since.

        Raises:
            SignatureError: it was not, or it has.
        """
        signature = signature_path(artifact)
        remedy = "sign it with `cifarx export --sign KEY`"
        try:
            content = read_regular_file(signature, _MAX_SIGNATURE_BYTES)
        except FileNotFoundError as error:
            raise SignatureError(f"{artifact} is not signed (there is no {signature.name})", remedy) from error
        except OSError as error:
            raise SignatureError(f"cannot read {signature} ({error_message(error)})", "check the path") from error
        key_id = _signing_key_id(content)
        if key_id is None:
            raise SignatureError(f"{signature} is not a signature of model-signing with a key", remedy)
        if key_id != self._key_id:
            problem = f"{artifact} is signed with another key than that of {self._key_file}"
            raise SignatureError(problem, "give the public key of the key that signed it")
        config = self._verifying.Config().use_elliptic_key_verifier(public_key=self._key_file)
        try:
            config.verify(artifact.resolve(), signature)
        except Exception as error:  # model-signing raises whatever the JSON, the cryptography and the files cause
            problem = f"{artifact} is not what {signature.name} signs: it or its signature has changed"
            raise SignatureError(problem, "restore both files, or sign it again") from error


def _import(name: str) -> Any:
    """Import a module of model-signing.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(f"model_signing.{name}")
    except ModuleNotFoundError as error:
        problem = f"signatures need {error.name}, which is not installed"
        raise UsageError(problem, 'pip install "cifarx[sign]"') from error


def _load_private_key(path: Path) -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(path)
    if b"PRIVATE KEY-----" not in content:
        kind = "a public key" if b"PUBLIC KEY-----" in content else "not a private key"
        raise UsageError(f"{path} is {kind}", "give the PEM file of the private key to sign with")
    try:
        key = load_pem_private_key(content, None)
    except TypeError as error:
        problem = f"the private key in {path} has a password"
        raise UsageError(problem, f"write one without: openssl pkey -in {path} -out unlocked.pem") from error
    except Exception as error:  # also UnsupportedAlgorithm, which has no common base class with ValueError
        raise UsageError(f"cannot read the private key in {path} ({error_message(error)})", _CREATE_KEY) from error
    return _require_curve(key, path)  # type: ignore[no-any-return]


def _load_public_key(path: Path) -> "EllipticCurvePublicKey":
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read_key(path)
    if b"PUBLIC KEY-----" not in content:
        kind = "a private key" if b"PRIVATE KEY-----" in content else "not a public key"
        remedy = "give its public key: openssl pkey -in PRIVATE.pem -pubout -out public.pem"
        raise UsageError(f"{path} is {kind}", remedy)
    try:
        key = load_pem_public_key(content)
    except Exception as error:
        raise UsageError(f"cannot read the public key in {path} ({error_message(error)})", _CREATE_KEY) from error
    return _require_curve(key, path)  # type: ignore[no-any-return]


def _read_key(path: Path) -> bytes:
    try:
        return read_regular_file(path, _MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the key {path} ({error_message(error)})", "check the path") from error


def _require_curve(key: Any, path: Path) -> Any:
    """Return a key that model-signing can use."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _CURVES:
        kind = f"on the curve {curve}" if curve else type(key).__name__.lstrip("_").partition("P")[0]
        raise UsageError(f"the key in {path} is {kind}, not on P-256, P-384 or P-521", _CREATE_KEY)
    return key


def _key_id(key: "EllipticCurvePublicKey") -> str:
    """Return what identifies a public key in signatures: the SHA-256 of its PEM."""
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _signing_key_id(signature: bytes) -> str | None:
    """Return what identifies the key in a signature; None if it is not one, or was not made with a key pair."""
    try:
        hint = json.loads(signature)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return hint if isinstance(hint, str) else None
