"""The options about signatures of `export`, `adopt` and `verify`, and what these commands do with them."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from cifarx.output.console import note, print_error
from cifarx_serve.files.signature import SignatureError, Signer, Verifier, signature_path

SigningKey: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--sign", metavar="KEY", help="Sign what is written with this private key, a PEM file: FILE.sig, next to FILE."
    ),
]
RequiredKey: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--require-signature",
        metavar="PUBKEY",
        help="Check that the artifact is signed with the private key of this public key, a PEM file.",
    ),
]


def open_signer(key: Path | None) -> Signer | None:
    """Return what signs with the key of `--sign`; None without the option.

    Raises:
        UsageError: the file has no private key that can be used.
    """
    return None if key is None else Signer(key)


def sign_artifact(signer: Signer | None, artifact: Path) -> None:
    """Sign an artifact that was written; without a signer, say that an older signature is not its own."""
    if signer is not None:
        note(f"wrote {signer.sign(artifact)}")
    elif signature_path(artifact).exists():
        note(f"note: {signature_path(artifact)} is the signature of an older file: sign again with --sign")


def check_signature(artifact: str, key: Path | None) -> tuple[str | None, bool]:
    """Report the signature of an artifact on standard error.

    Returns:
        Its state, "valid", "invalid", "unchecked" without `--require-signature`, or None without a signature; and
        whether it is what the option requires.
    """
    path = Path(artifact)
    if key is None:
        if not signature_path(path).exists():
            return None, True
        note(f"note: {signature_path(path)} was not checked: give its public key with --require-signature")
        return "unchecked", True
    try:
        Verifier(key).verify(path)
    except SignatureError as error:
        print_error(str(error))
        return "invalid", False
    note(f"{signature_path(path).name} is a valid signature of {path} with the key {key}")
    return "valid", True
