# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What mkdocs needs to make a site of the pages as they lie in the repository. mkdocs.yml names this file.

mkdocs takes one folder of pages; here they lie beside what they describe, and are read by many as files. So nothing is
copied: each page, and each file that a page links to, is handed to mkdocs under its path in the repository, and a
relative link leads to the same place in both.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "cache", "config", "docs", "gateway", "nbd", "systemd", "tests")
LINK = re.compile(r"\]\(([^)#\s]+)")

NOT_RENDERED = re.compile(r"```|<p>\|\s|<p>[^<]*\n[-*] ")
"""A code block, a table or a list that stayed text: what GitHub takes and Python-Markdown does not."""

log = logging.getLogger("mkdocs.plugins.forebay")


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def pages() -> Iterator[Path]:
    """Every page of the repository; tables that the bench keeps are part of a page, and none themselves."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        found = sorted((ROOT / folder).rglob("*.md"))
        yield from (page for page in found if not page.is_relative_to(ROOT / "bench/results"))


def linked(page: Path) -> Iterator[Path]:
    """Files other than pages that a page links to."""
    for target in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve()
        if path.is_file() and path.suffix != ".md" and path.is_relative_to(ROOT):
            yield path


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages, and what they link to."""
    own = Files([file for file in files if file.src_dir != config.docs_dir])
    wanted = [*pages(), *(path for page in pages() for path in linked(page))]
    for path in dict.fromkeys(wanted):
        name = path.relative_to(ROOT).as_posix()
        own.append(File.generated(config, name, abs_src_path=str(path)))
    return own


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn, which ends a strict build, where something of the page was not understood."""
    if found := NOT_RENDERED.search(html):
        near = html[max(0, found.start() - 60) : found.end() + 60]
        log.warning("%s: not rendered: %r", page.file.src_uri, near)
    return html
