"""Files with the spec and a checksum after the content of a library: their parts, and their bytes."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_export.formats.sealed_artifact import SealedArtifact
from cifarx_serve.files.checksum import ChecksumState, read_checksum
from cifarx_serve.files.trailing_document import read_document
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(model="lzh", class_names=("cat", "dog"), input=InputSpec(height=32, width=32))


@settings(max_examples=20)
@given(content=st.binary(max_size=200))
def test_the_content_comes_first_and_then_the_spec(content: bytes) -> None:
    path = Path("a.pte")
    SealedArtifact(content, {}).save(path, SPEC)
    assert path.read_bytes().startswith(content)
    assert read_document(path) == SPEC.to_json().encode()
    assert read_checksum(path).state is ChecksumState.INTACT


def test_another_spec_changes_only_what_follows_the_content(tmp_path: Path) -> None:
    artifact = SealedArtifact(b"content", {"library": "1.0"})
    written = []
    for spec in (SPEC, artifact.complete_spec(SPEC), SPEC):
        artifact.save(tmp_path / "a.pte", spec)
        written.append((tmp_path / "a.pte").read_bytes())
    assert written[0] == written[2] != written[1]


def test_facts_are_added_to_those_of_the_spec() -> None:
    spec = SealedArtifact(b"", {"library": "1.0"}).complete_spec(SPEC)
    assert SealedArtifact(b"", {"opset": "18"}).complete_spec(spec).exporter == {"library": "1.0", "opset": "18"}
