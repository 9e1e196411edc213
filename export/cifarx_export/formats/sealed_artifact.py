"""Files of a library that ignores what comes after its own content: there they hold the spec and a checksum."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifarx_export.formats.registry import Artifact
from cifarx_export.parity.checks import Check
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.files.trailing_document import append_document
from cifarx_serve.spec import ModelSpec


class SealedArtifact(Artifact):
    """A model as a library reads it.

    Args:
        content: the model.
        facts: facts about the conversion that the spec records.
        checks: what the conversion found about the model.
    """

    def __init__(self, content: bytes, facts: Mapping[str, str], checks: Sequence[Check] = ()) -> None:
        self.content = content
        self.facts = facts
        self.checks = checks

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write the model, the spec and a checksum. The same model, library versions and spec give the same bytes."""
        path.write_bytes(self.content)
        append_document(path, spec.to_json().encode())
        write_checksum(path)
