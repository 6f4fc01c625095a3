"""`make docs`: the site has every page and every command, and no link that leads nowhere, there or on a code host."""

import shlex
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from dlrm.cli import COMMANDS
from tests.launching import ROOT, run

PAGES = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def build(source: Path, output: Path, *flags: str) -> tuple[int, str]:
    """Runs what `make docs` runs, on another folder; its exit code and warnings."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if " -m sphinx " in line]
    command = shlex.split(line)
    assert (command[0], command[-2:]) == ("$(BIN)/python", [".", "build/site"])
    command[command.index("build/doctrees")] = f"{output}-doctrees"
    done = run([sys.executable, *command[1:-2], *flags, str(source), str(output)], timeout=800)
    return done.returncode, done.stderr


class Html(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.add(value)
            if name == "id" and value is not None:
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Links within a site to files and anchors that are not there."""
    pages = {path: Html(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchors = pages[target].anchors if target in pages else {url.fragment}
            if not target.is_file() or url.fragment not in anchors:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("docs") / "site"
    code, warnings = build(ROOT, output)
    assert (code, warnings) == (0, "")
    return output


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    assert broken_links(site) == []


def test_start_page_leads_to_every_page_and_command(site: Path) -> None:
    start = Html(site / "index.html").links
    pages = {str(path.relative_to(ROOT).with_suffix(".html")) for path in PAGES} - {"README.html"}
    commands = {f"build/commands/dlrm-{name}.html" for name in COMMANDS}
    assert pages | commands | {"build/commands/dlrm_main.py.html"} <= start


def test_pages_hold_what_their_sources_hold(site: Path) -> None:
    assert "What was not tried" in (site / "index.html").read_text()
    assert "--dense_arch_layer_sizes" in (site / "build/commands/dlrm_main.py.html").read_text()
    for name in COMMANDS:
        usage = "usage: dlrm_main.py" if name == "train" else f"usage: dlrm {name}"
        assert usage in (site / f"build/commands/dlrm-{name}.html").read_text()
    figure = ROOT / "benchmarks/results/kills.json"
    assert [path.read_bytes() for path in site.rglob("kills.json")] == [figure.read_bytes()]  # linked: a download


def links_of(page: Path) -> Iterator[str]:
    for block in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for token in block.children or []:
            yield str(token.attrGet("href") or token.attrGet("src") or "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_on_a_code_host_too(page: Path) -> None:
    local = [urlsplit(link).path for link in links_of(page) if not urlsplit(link).scheme]
    assert [path for path in local if not (page.parent / unquote(path)).exists()] == []


def test_what_is_broken_stops_the_build(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "site"
    (source / "docs").mkdir(parents=True)
    links = "[a](docs/a.md#here) [b](docs/a.md#nowhere) [c](docs/absent.md) [d](absent.json) [e](docs) [f](#nowhere)"
    (source / "README.md").write_text(f"# Start\n\n{links}\n\n```{{toctree}}\n\ndocs/a\n```\n")
    (source / "docs" / "a.md").write_text("# A\n\n## Here\n")
    (source / "docs" / "unlisted.md").write_text("# In no table of contents\n")
    code, warnings = build(source, output, "-D", "extensions=myst_parser")
    assert code == 1
    wanted = ["'nowhere'", "'docs/absent.md'", "'absent.json'", "'docs'", "'nowhere'", "any toctree"]
    for text in wanted:
        assert text in warnings
    assert warnings.count("WARNING") == len(wanted), warnings
    assert any("absent.md" in link for link in broken_links(output))
