"""Each command of README and guides that can run here does, in the order of its page, in an empty folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT, Block, blocks_of

SECONDS = 900
CODE = ("dlrm_main.py", "dlrm", "benchmarks", "tests")


def run(block: Block, folder: Path, log: Path) -> None:
    """Runs a block in bash, which ends at its first command that fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("w+") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            # One thread a process: with other tests beside it, threads of an operator wait for one that has no core.
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        assert code == block.exit_code, (
            f"{block.page}:{block.line}: exit code {code}\n{block.text}\n\n{output.read()[-5000:]}"
        )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of(page: str, tmp_path: Path) -> None:
    for name in CODE:
        (tmp_path / name).symlink_to(ROOT / name)
    for number, block in enumerate(blocks_of(page, (ROOT / page).read_text())):
        if block.not_run is None:
            started = time.monotonic()
            run(block, tmp_path, tmp_path / f"block_{number}.log")
            print(f"{page}:{block.line}: {time.monotonic() - started:.1f} s")  # -rP shows them


def test_no_command_escapes() -> None:
    """Commands stand in bash blocks: in no indented one, and behind no prompt. Output may hold them."""
    starts = ("dlrm ", "python ", "torchrun ", "torchx ", "make ", "$ ")
    for page in PAGES:
        inside = None
        for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
            if line.startswith("```"):
                inside = line[3:] or "text" if inside is None else None
            elif inside != "bash":
                assert not line.startswith(tuple(f"    {start}" for start in starts)), f"{page}:{number}: {line}"
                assert inside is None or not line.startswith("$ "), f"{page}:{number}: {line}"


def test_blocks() -> None:
    text = "\n".join(
        [
            *("<!-- not run: needs a GPU -->", "```bash", "a", "b", "```"),
            *("<!-- run: expect exit 2 -->", "```bash", "c", "```", "```", "d", "```", "```bash", "e", "```"),
        ]
    )
    assert blocks_of("page", text) == [
        Block("page", 3, "a\nb", "needs a GPU"),
        Block("page", 8, "c", None, 2),
        Block("page", 14, "e"),
    ]


@pytest.mark.parametrize("note", ["<!-- not run: -->", "<!-- not run -->", "<!-- run: expect exit two -->"])
def test_a_note_that_says_nothing_is_refused(note: str) -> None:
    with pytest.raises(ValueError, match=r"page:1: .* says nothing"):
        blocks_of("page", f"{note}\n```bash\na\n```")


def test_a_note_before_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"page:1: .* stands before no bash block"):
        blocks_of("page", "<!-- not run: needs a GPU -->\n\n```bash\na\n```")
