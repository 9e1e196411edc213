"""Proofs as one page: whole, alone, and with every name escaped."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from cifarx_export.export import CPU
from cifarx_export.parity.checks import Check
from cifarx_export.parity.compare import check_parity, run_reference
from cifarx_export.parity.data import parity_data
from cifarx_export.parity.error_analysis import analyze_errors
from cifarx_export.parity.html import parity_page, write_parity_page
from cifarx_export.parity.report import ParityReport
from cifarx_export.parity.tolerances import gate
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import OutputError
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support import parity_summary

VOID = {"meta", "img"}
HOSTILE = '<script>alert("x")</script>\'"&{{ 7 * 7 }}'

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)

SUMMARY = msgspec.structs.replace(
    parity_summary.SUMMARY,
    passed=False,
    images=40,
    rtol=1e-4,
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; it must close what it opens, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[np.ndarray]:
        found = []
        for image in self.all("img"):
            head, _, body = str(image["src"]).partition(",")
            assert head == "data:image/png;base64"
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))))
        return found


def report(names: tuple[str, ...] = ("cat", "dog", "frog"), **changes: object) -> ParityReport:
    """Of 40 images, of which the first twelve get another answer."""
    classes = len(names)
    random = np.random.default_rng(0)
    reference = random.normal(size=(40, classes)).astype(np.float32)
    artifact = reference + random.normal(scale=1e-5, size=reference.shape).astype(np.float32)
    artifact[:12] = np.roll(reference[:12], 1, axis=1)
    whole = ParityReport(
        artifact="lzh_9.onnx",
        artifact_sha256=None,
        checkpoint="lzh_9.pth",
        checkpoint_sha256="2" * 64,
        format="onnx",
        precision="fp32",
        checks=(Check("class names", True, ", ".join(names)), Check("tolerance", False, "max |Δ| 2e-06")),
        summary=SUMMARY,
        evidence=analyze_errors(names, np.arange(40), np.arange(40) % classes, reference, artifact),
    )
    return msgspec.structs.replace(whole, **changes)


def test_one_section_an_artifact_and_a_row_of_the_summary_that_leads_to_it() -> None:
    good = report(artifact="lzh_9.fp16.onnx", precision="fp16", summary=msgspec.structs.replace(SUMMARY, passed=True))
    page = Page(parity_page([report(), good], IMAGES))
    assert [section["id"] for section in page.all("section")] == ["artifact-1", "artifact-2"]
    assert [section.get("class") for section in page.all("section")] == ["failed", None]
    assert [link["href"] for link in page.all("a")] == ["#artifact-1", "#artifact-2"]
    assert "1 of 2 artifacts proved against lzh_9.pth on 40 images of pictures" in page.words
    for text in ("✓", "✗", "not written: its proof failed", "2" * 64, "≤ 0.0001 + 0.0001·|ref|", "-25.00", "Python"):
        assert text in page.words, text


def test_it_stands_alone() -> None:
    text = parity_page([report()], IMAGES)
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        if tag == "img":
            assert str(attributes.pop("src")).startswith("data:image/png;base64,")
        assert "src" not in attributes
        assert str(attributes.get("href") or "#").startswith("#")
    for word in ("http:", "https:", "url(", "@import", "javascript:"):
        assert word not in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in str(page.all("meta"))


@pytest.mark.parametrize("few", [True, False])
def test_names_are_text(few: bool) -> None:
    """In every place where a name is shown: a matrix for few classes, a list for many."""
    names = (HOSTILE, f"{HOSTILE} 2", "frog") if few else tuple(f"{HOSTILE} {index}" for index in range(20))
    hostile = report(names, artifact=HOSTILE, checkpoint=HOSTILE, format=HOSTILE)
    hostile = msgspec.structs.replace(
        hostile,
        summary=msgspec.structs.replace(SUMMARY, data=HOSTILE, provider=HOSTILE, data_fingerprint=HOSTILE),
        checks=(Check(HOSTILE, False, HOSTILE),),
    )
    text = parity_page([hostile], IMAGES)
    page = Page(text)
    assert page.all("script") == []
    assert "<script" not in text
    assert HOSTILE in page.words
    assert {tag for tag, _ in page.elements} >= {"section", "svg", "figure", "figcaption"}


def test_the_pictures_are_the_worst_images_enlarged_by_whole_pixels() -> None:
    one = report()
    assert one.evidence is not None
    assert len(one.evidence.worst) == 8
    pictures = Page(parity_page([one], IMAGES)).pictures()
    assert len(pictures) == 8
    for worst, picture in zip(one.evidence.worst, pictures, strict=True):
        np.testing.assert_array_equal(picture, IMAGES[worst.image].repeat(20, axis=0).repeat(20, axis=1))


def test_large_pictures_are_made_smaller() -> None:
    large = np.zeros((40, 700, 350, 3), np.uint8)
    assert {picture.shape for picture in Page(parity_page([report()], large)).pictures()} == {(320, 160, 3)}


def test_disagreements_are_a_matrix_where_classes_are_few_and_a_list_where_they_are_many() -> None:
    few = parity_page([report()], IMAGES)
    assert 'class="matrix"' in few
    assert "Where the answers differ most" not in few
    many = parity_page([report(tuple(f"kind {index}" for index in range(30)))], IMAGES)
    assert 'class="matrix"' not in many
    assert "Where the answers differ most" in many
    assert "where it is lowest" in many


def test_where_all_agree_there_are_no_disagreements_to_show() -> None:
    same = np.eye(3, dtype=np.float32)
    agreeing = analyze_errors(("cat", "dog", "frog"), np.arange(3), None, same, same)
    text = parity_page([report(evidence=agreeing)], IMAGES)
    assert "Where the answers differ" not in text
    assert "other answer</span>" not in text
    assert "the same to the last bit: 9" in Page(text).words


def test_an_artifact_that_gave_no_answer_still_has_a_section() -> None:
    nothing = msgspec.structs.replace(
        SUMMARY, max_abs_error=None, mean_abs_error=None, p999_abs_error=None, required_tolerance=None,
        reference_accuracy=None, accuracy=None,
    )  # fmt: skip
    page = Page(parity_page([report(evidence=None, summary=nothing)], IMAGES))
    assert "The artifact gave no answer to compare." in page.words
    assert page.all("img") == []


def test_what_is_not_finite_is_said() -> None:
    reference = np.zeros((2, 3), np.float32)
    artifact = np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
    found = analyze_errors(("cat", "dog", "frog"), np.arange(2), None, reference, artifact)
    page = Page(parity_page([report(evidence=found)], IMAGES))
    assert "not finite: 1" in page.words
    assert page.words.count("not finite") >= 3  # beside the histogram, of the logit, and of the image's error
    assert "nan" not in page.words.lower().replace("nan or inf", "")


def test_it_is_written_whole_or_not_at_all() -> None:
    path = Path("reports/page.html")
    write_parity_page(path, [report()], IMAGES)
    content = path.read_text(encoding="utf-8")
    assert content == parity_page([report()], IMAGES)
    assert content.startswith("<!doctype html>")
    with pytest.raises(IndexError):
        write_parity_page(path, [report()], IMAGES[:2])  # not the images of the proof
    assert path.read_text(encoding="utf-8") == content
    assert [found.name for found in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(OutputError, match="cannot write"):
        write_parity_page(Path("reports/page.html/below.html"), [report()], IMAGES)


@pytest.mark.slow
def test_of_a_real_proof(checkpoint: Path, stale: Path, good_onnx: Path) -> None:
    """One that passed and one that failed, against weights of another seed."""
    data = parity_data(load_checkpoint(checkpoint).spec, "builtin")
    reports = []
    for source in (checkpoint, stale):
        with PyTorchBackend(source, CPU) as trained, open_backend(good_onnx, device="cpu") as backend:
            proof = check_parity(run_reference(trained, data), backend, gate("fp32"))
        reports.append(report(checks=proof.checks, summary=proof.summary, evidence=proof.evidence))
    page = Page(parity_page(reports, data.images))
    assert "1 of 2 artifacts proved" in page.words
    assert len(page.pictures()) == 16
    assert "other answer" in page.words
