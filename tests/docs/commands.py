"""The commands of README and guides: bash blocks, in the order of a page."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs/guides").glob("*.md"))))
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
EXIT_CODE = re.compile(r"<!-- run: expect exit (\d+) -->")


@dataclass(frozen=True)
class Block:
    """A block of commands.

    Attributes:
        line: of its first command in the page.
        not_run: why it can't run here; None where it can.
        exit_code: that its last command must end with.
    """

    page: str
    line: int
    text: str
    not_run: str | None = None
    exit_code: int = 0


def blocks_of(page: str, text: str) -> list[Block]:
    """The bash blocks of a page.

    A comment in the line before a block says that it is not run and why, or which exit code it must have.

    Raises:
        ValueError: at such a comment that stands before no block.
    """
    blocks = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_note = bool(NOT_RUN.fullmatch(line) or EXIT_CODE.fullmatch(line))
        if (is_note or line.startswith(("<!-- not", "<!-- run"))) and not (
            is_note and lines[number + 1 : number + 2] == ["```bash"]
        ):
            raise ValueError(f"{page}:{number + 1}: {line!r} stands before no bash block, or says nothing")
        if line == "```bash":
            end = lines.index("```", number)
            before = lines[number - 1] if number else ""
            not_run, exit_code = NOT_RUN.fullmatch(before), EXIT_CODE.fullmatch(before)
            blocks.append(
                Block(
                    page,
                    number + 2,
                    "\n".join(lines[number + 1 : end]),
                    not_run[1] if not_run else None,
                    int(exit_code[1]) if exit_code else 0,
                )
            )
    return blocks
