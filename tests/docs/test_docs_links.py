"""Check that relative links point to existing files, and anchors to headings."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

CHECKED = [
    *PAGES,
    *(p for folder in ("tests", "clusters") for p in sorted((ROOT / folder).rglob("README.md"))),
]
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, following the rule of GitHub and MyST."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found: set[str] = set()
    for heading in _HEADING.findall(text):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def broken(page: Path) -> list[str]:
    """Return the broken links of a page."""
    found = []
    text = _CODE.sub("`code`", page.read_text(encoding="utf-8"))
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text(
        "# One thing\n\n```sh\n# not a heading\n```\n\n# One thing\n"
    )
    page.write_text(
        "[a](other.md#one-thing) [b](other.md#one-thing-1) [c](https://example.org/x) `[d](e)`\n"
        "[f](other.md#not-a-heading) [g](gone.md) ![h](gone.png) [i](#here) [j](other.md#one)\n"
    )
    assert broken(page) == [
        "other.md#not-a-heading",
        "gone.md",
        "gone.png",
        "#here",
        "other.md#one",
    ]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
