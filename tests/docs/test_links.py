"""The links of the pages that MkDocs does not check, and the length of the README."""

import pytest

from tests.support.documentation import ROOT, Page, find_pages

PAGES = find_pages("*.md", "examples/**/*.md", "benchmarks/**/*.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Page) -> None:
    for link in page.links():
        target, _, anchor = link.partition("#")
        path = page.path.parent / target if target else page.path
        assert path.exists(), f"{page.name}: no file {link}"
        assert path.resolve().is_relative_to(ROOT), f"{page.name}: {link} leaves the project"
        if anchor:
            assert anchor in Page(path.resolve()).headings(), f"{page.name}: no heading {link}"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
