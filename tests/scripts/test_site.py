"""The site of the documentation: each page is in it and in its list, and all that pages link to comes along."""

from __future__ import annotations

import re
from pathlib import Path

from scripts.site_pages import ROOT, copy_to, documents, linked
from tests.test_documentation import DOCUMENTS


def test_the_list_of_the_site_has_each_page_once() -> None:
    listed = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT)) for page in documents())


def test_every_document_is_a_page() -> None:
    assert set(DOCUMENTS) <= set(documents())


def test_what_pages_link_to_is_copied_with_them(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "of-a-former-time.md").touch()
    copy_to(tmp_path / "pages")
    copied = {path.relative_to(tmp_path / "pages") for path in (tmp_path / "pages").rglob("*") if path.is_file()}
    needed = {*documents(), *(path for page in documents() for path in linked(page))}
    assert copied == {path.relative_to(ROOT) for path in needed}
    assert Path("LICENSE") in copied


def test_the_site_fetches_nothing_and_a_broken_link_fails_it() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert re.search(r"^  anchors: warn$", settings, re.MULTILINE)
    assert "build --strict" in (ROOT / "scripts" / "site").read_text()
