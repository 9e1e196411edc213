"""Parity reports as one HTML page: valid, self-contained, and with every name escaped."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from cifarx_export.parity.checks import Check
from cifarx_export.parity.compare import check_parity, run_reference
from cifarx_export.parity.data import load_parity_data
from cifarx_export.parity.error_analysis import analyze_errors
from cifarx_export.parity.html import render_html_report, write_html_report
from cifarx_export.parity.report import ParityReport
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import OutputError
from cifarx_serve.spec import InputSpec, ModelSpec
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
    """The elements of a page with their attributes, and its text; checks that tags are closed in order."""

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

    def images(self) -> list[np.ndarray]:
        found = []
        for image in self.all("img"):
            head, _, body = str(image["src"]).partition(",")
            assert head == "data:image/png;base64"
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))))
        return found


def report(names: tuple[str, ...] = ("cat", "dog", "frog"), **changes: object) -> ParityReport:
    """Return a report of 40 images, the first twelve of which are flips."""
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
        error_analysis=analyze_errors(names, np.arange(40), np.arange(40) % classes, reference, artifact),
    )
    return msgspec.structs.replace(whole, **changes)


def test_warnings_and_splits_are_shown() -> None:
    summary = msgspec.structs.replace(SUMMARY, test_images=30, training_images=10, warnings=(f"only 40 {HOSTILE}",))
    page = Page(render_html_report([report(summary=summary)], IMAGES))
    assert f"WARNING: only 40 {HOSTILE}" in page.words
    assert page.words.count("30 test and 10 training images of pictures") == 2
    assert "Accuracy of 30 test images, artifact" in page.words
    assert "95% bound, one-sided" in page.words


def test_each_artifact_has_a_section_and_a_linked_row_in_the_summary() -> None:
    good = report(artifact="lzh_9.fp16.onnx", precision="fp16", summary=msgspec.structs.replace(SUMMARY, passed=True))
    page = Page(render_html_report([report(), good], IMAGES))
    assert [section["id"] for section in page.all("section")] == ["artifact-1", "artifact-2"]
    assert [section.get("class") for section in page.all("section")] == ["failed", None]
    assert [link["href"] for link in page.all("a")] == ["#artifact-1", "#artifact-2"]
    assert "1 of 2 artifacts passed the parity check against lzh_9.pth on 40 images of pictures" in page.words
    for text in (
        "✓",
        "✗",
        "not written: the parity check failed",
        "2" * 64,
        "≤ 0.0001 + 0.0001·|ref|",
        "-25.00",
        "Python",
    ):
        assert text in page.words, text


def test_what_is_assumed_is_neither_passed_nor_failed() -> None:
    checks = (Check("class names", True, "ASSUMED: class 0, class 1", assumed=True), Check("output", True, "2 logits"))
    good = report(checks=checks, summary=msgspec.structs.replace(SUMMARY, passed=True))
    page = Page(render_html_report([good], IMAGES))
    rows = [item for item in page.all("li") if item.get("class")]
    assert rows == [{"class": "assumed"}]
    assert page.words.count("ASSUMED: class names") == 1  # in the head of the section
    assert "?assumedclass namesASSUMED: class 0, class 1" in page.words
    assert "✓passedoutput" in page.words


def test_the_bound_of_the_agreement_is_shown() -> None:
    assert "95% bound, one-sided≥ 70.00%" in Page(render_html_report([report()], IMAGES)).words
    older = report(summary=msgspec.structs.replace(SUMMARY, agreement_bound=None))
    assert "confidence bound" not in render_html_report([older], IMAGES)


def test_grayscale_images_and_one_logit_are_shown() -> None:
    logits = np.linspace(-1, 1, 40, dtype=np.float32)[:, None]
    spec = ModelSpec(
        model="net",
        class_names=("cat", "dog"),
        input=InputSpec(height=32, width=32, channels=1, color="L"),
        activation="sigmoid",
        outputs=1,
    )
    analysis = analyze_errors(("cat", "dog"), np.arange(40), None, logits, -logits, spec)
    page = Page(render_html_report([report(error_analysis=analysis)], IMAGES[..., :1]))
    assert page.images()[0].ndim == 2
    assert "-1.00001.0000" in page.words


def test_it_is_self_contained() -> None:
    text = render_html_report([report()], IMAGES)
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
def test_names_are_escaped(few: bool) -> None:
    """Everywhere a name is shown: in the matrix for few classes, and in the list for many."""
    names = (HOSTILE, f"{HOSTILE} 2", "frog") if few else tuple(f"{HOSTILE} {index}" for index in range(20))
    hostile = report(names, artifact=HOSTILE, checkpoint=HOSTILE, format=HOSTILE)
    hostile = msgspec.structs.replace(
        hostile,
        summary=msgspec.structs.replace(SUMMARY, data=HOSTILE, provider=HOSTILE, data_fingerprint=HOSTILE),
        checks=(Check(HOSTILE, False, HOSTILE),),
    )
    text = render_html_report([hostile], IMAGES)
    page = Page(text)
    assert page.all("script") == []
    assert "<script" not in text
    assert HOSTILE in page.words
    assert {tag for tag, _ in page.elements} >= {"section", "svg", "figure", "figcaption"}


def test_the_worst_images_are_shown_enlarged_by_an_integer_factor() -> None:
    one = report()
    assert one.error_analysis is not None
    assert len(one.error_analysis.worst) == 8
    images = Page(render_html_report([one], IMAGES)).images()
    assert len(images) == 8
    for worst, image in zip(one.error_analysis.worst, images, strict=True):
        np.testing.assert_array_equal(image, IMAGES[worst.image].repeat(20, axis=0).repeat(20, axis=1))


def test_large_images_are_reduced() -> None:
    large = np.zeros((40, 700, 350, 3), np.uint8)
    assert {image.shape for image in Page(render_html_report([report()], large)).images()} == {(320, 160, 3)}


def test_disagreements_are_a_matrix_for_few_classes_and_a_list_for_many() -> None:
    few = render_html_report([report()], IMAGES)
    assert 'class="matrix"' in few
    assert "Most frequent disagreements" not in few
    many = render_html_report([report(tuple(f"kind {index}" for index in range(30)))], IMAGES)
    assert 'class="matrix"' not in many
    assert "Most frequent disagreements" in many
    assert "lowest first" in many


def test_full_agreement_shows_no_disagreements() -> None:
    same = np.eye(3, dtype=np.float32)
    agreeing = analyze_errors(("cat", "dog", "frog"), np.arange(3), None, same, same)
    text = render_html_report([report(error_analysis=agreeing)], IMAGES)
    assert "disagreements" not in text.lower()
    assert "flip</span>" not in text
    assert "Logits without an error: 9" in Page(text).words


def test_an_artifact_without_logits_has_a_section() -> None:
    unknown = msgspec.structs.replace(
        SUMMARY, max_abs_error=None, mean_abs_error=None, p999_abs_error=None, required_tolerance=None,
        reference_accuracy=None, accuracy=None,
    )  # fmt: skip
    page = Page(render_html_report([report(error_analysis=None, summary=unknown)], IMAGES))
    assert "The artifact returned no logits to compare." in page.words
    assert page.all("img") == []


def test_values_that_are_not_finite_are_shown() -> None:
    reference = np.zeros((2, 3), np.float32)
    artifact = np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)
    found = analyze_errors(("cat", "dog", "frog"), np.arange(2), None, reference, artifact)
    page = Page(render_html_report([report(error_analysis=found)], IMAGES))
    assert "not finite: 1" in page.words
    assert page.words.count("not finite") >= 3  # below the histogram, for the logit, and for the image's error
    assert "nan" not in page.words.lower().replace("nan or inf", "")


def test_it_is_written_atomically() -> None:
    path = Path("reports/page.html")
    write_html_report(path, [report()], IMAGES)
    content = path.read_text(encoding="utf-8")
    assert content == render_html_report([report()], IMAGES)
    assert content.startswith("<!doctype html>")
    with pytest.raises(IndexError):
        write_html_report(path, [report()], IMAGES[:2])  # not the images of the parity check
    assert path.read_text(encoding="utf-8") == content
    assert [found.name for found in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(OutputError, match="cannot write"):
        write_html_report(Path("reports/page.html/below.html"), [report()], IMAGES)


@pytest.mark.slow
def test_real_parity_checks(checkpoint: Path, other_checkpoint: Path, good_onnx: Path) -> None:
    """One check that passes, and one that fails because the weights are from another seed."""
    data = load_parity_data(load_checkpoint(checkpoint).spec, "builtin")
    reports = []
    for source in (checkpoint, other_checkpoint):
        with PyTorchBackend(source, Device("cpu")) as trained, open_backend(good_onnx, device="cpu") as backend:
            result = check_parity(run_reference(trained, data), backend, get_tolerance("fp32"))
        reports.append(report(checks=result.checks, summary=result.summary, error_analysis=result.error_analysis))
    page = Page(render_html_report(reports, data.images))
    assert "1 of 2 artifacts passed" in page.words
    assert len(page.images()) == 16
    assert "flip" in page.words
