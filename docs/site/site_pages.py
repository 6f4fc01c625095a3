"""What the site has beside the Markdown files: tables of contents, a page for each command, index.html."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.typing import ExtensionMetadata

from dlrm.bench.command import CASES
from dlrm.cli import COMMANDS

ROOT = Path(__file__).parents[2]
COLUMNS = 82
"""Characters in a line of the theme's code blocks."""

PARAGRAPH = 120
"""Lines of --help that are longer are paragraphs, which a terminal would wrap."""

DLRM = ["-m", "dlrm.cli"]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.add_config_value("guides", [], "env", list)
    app.connect("config-inited", write_command_pages)
    app.connect("source-read", add_contents)
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_command_pages(app: Sphinx, _config: Config) -> None:
    """Writes build/commands: what each command answers to --help."""
    commands = {"dlrm_main.py": ["dlrm_main.py"]}
    for name in COMMANDS:
        commands[f"dlrm {name}"] = [*DLRM, name]
        if name == "bench":
            commands |= {f"dlrm bench {case}": [*DLRM, name, case] for case in CASES}
    folder = Path(app.srcdir) / "build" / "commands"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for title, text in zip(commands, pool.map(help_of, commands.values()), strict=True):
            (folder / f"{_file_name(title)}.md").write_text(f"# {title}\n\n{text}", encoding="utf-8")
    contents = toctree(map(_file_name, commands))
    (folder / "index.md").write_text(f"# Commands\n\n{help_of(DLRM)}{contents}", encoding="utf-8")


def help_of(command: list[str]) -> str:
    """A code block of what a Python command answers to --help.

    Raises:
        subprocess.CalledProcessError: if it does not end with exit code 0.
    """
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONUTF8": "1"}
    argv = [sys.executable, *command, "--help"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    lines = [textwrap.fill(line, COLUMNS) if len(line) > PARAGRAPH else line for line in done.stdout.splitlines()]
    return "\n".join(["~~~text", *lines, "~~~", ""])


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Gives README.md and docs/design/README.md the tables of contents that a code host would show as code."""
    pages = sorted(app.env.found_docs)
    if docname == "docs/design/README":
        source[0] += toctree(page for page in pages if page.startswith("docs/design/") and page != docname)
    if docname == app.config.root_doc:
        guides = [page for name in app.config.guides if (page := f"docs/guides/{name}") in pages]
        measured = [
            page for page in pages if page.startswith("docs/") and page.split("/")[1] not in ("guides", "design")
        ]
        source[0] += toctree(["Start <self>", "build/commands/index"], hidden=True)
        source[0] += toctree(guides, "Guides", hidden=True)
        source[0] += toctree([*measured, "LOG"], "What was measured", hidden=True)
        source[0] += toctree(["docs/design/README", "CHANGELOG"], "The project", hidden=True)


def toctree(entries: Iterable[str], caption: str = "", hidden: bool = False) -> str:
    """A table of contents in MyST's Markdown. Entries are relative to the page, or absolute below the sources."""
    options = [f":caption: {caption}"] if caption else []
    options += [":hidden:"] if hidden else []
    paths = [f"/{entry}" if "/" in entry else entry for entry in entries]
    return "\n".join(["", "```{toctree}", *options, "", *paths, "```", ""])


def write_index(app: Sphinx, exception: Exception | None) -> None:
    """The start page, which is README.html, under the name that web servers look for."""
    if exception is None:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def _file_name(title: str) -> str:
    return title.replace(" ", "-")
