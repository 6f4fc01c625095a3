"""README and guides name flags that there are, and failures.md messages that are printed so."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from dlrm.bench.command import CASES
from dlrm.cli import COMMANDS, main
from dlrm.dataset.manifest import MANIFEST_NAME

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/guides").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FOREIGN_FLAGS = {
    *("--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--rdzv_conf"),  # torchrun
    *("--max-restarts", "--no_python", "--role", "--standalone", "--shutdown-timeout", "--signals_to_handle"),
    *("--script", "--dryrun", "--workspace"),  # torchx
    *("--no-deps", "--target"),  # pip
    *("--preserve-status", "--signal"),  # timeout
    *("--tag", "--wait", "--time"),  # docker, sbatch
    *("--nodes", "--ntasks-per-node", "--kill-on-bad-exit", "--gpus-per-task", "--distribution"),  # srun
    "--map-by",  # mpirun
    *("--logdir", "--ruleset"),  # TensorBoard, MLPerf's checker
    *("--repo-type", "--local-dir"),  # hf
    "--long",  # zstd
}
FOREIGN_MESSAGES = {"dlrm: command not found", "ChildFailedError", "AVX-512 kernels"}


def code_of(page: Path) -> str:
    """What stands in code spans and blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", prose)])


def help_of(*argv: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return output.getvalue()


@pytest.fixture(scope="module")
def named() -> dict[str, str]:
    """Flags, and a page that names each."""
    return {flag: page.name for page in PAGES for flag in FLAG.findall(code_of(page))}


def test_flags_are_there(named: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    texts = [help_of(name) for name in COMMANDS] + [help_of("bench", case) for case in CASES]
    scripts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    known = {flag for text in texts for flag in FLAG.findall(text)}
    known |= {flag for text in scripts for flag in re.findall(r'add_argument\(\s*"(--[a-z]\w*)"', text)}
    (component,) = [
        part
        for part in ast.parse((ROOT / "dlrm/launch/components.py").read_text(encoding="utf-8")).body
        if isinstance(part, ast.FunctionDef)
    ]
    known |= {f"--{argument.arg}" for argument in component.args.kwonlyargs}
    known |= {"--help", "--version"}
    assert {flag: page for flag, page in named.items() if flag not in known | FOREIGN_FLAGS} == {}


def test_no_foreign_flag_is_listed_in_vain(named: dict[str, str]) -> None:
    assert sorted(FOREIGN_FLAGS - named.keys()) == []


def printed_texts() -> list[str]:
    """Every text of the sources, with a line break for each value that is put in."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8").replace("\n", " ")]
    for path in sorted((ROOT / "dlrm").rglob("*.py")):
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(part, ast.JoinedStr):
                texts.append("".join(map(_shown, part.values)))
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                texts.append(part.value.replace("\n", " "))
    return texts


def _shown(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    return MANIFEST_NAME if isinstance(part.value, ast.Name) and part.value.id == "MANIFEST_NAME" else "\n"


def messages() -> list[str]:
    rows = [
        line
        for line in (ROOT / "docs/guides/failures.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def holds_in_order(text: str, parts: list[str]) -> bool:
    place = 0
    for part in parts:
        if (found := text.find(part, place)) < 0:
            return False
        place = found + len(part)
    return True


def test_messages_are_printed_so() -> None:
    """`...` stands for anything."""
    texts = printed_texts()
    absent = [
        message
        for message in messages()
        if message not in FOREIGN_MESSAGES and not any(holds_in_order(text, message.split("...")) for text in texts)
    ]
    assert absent == []
    assert set(messages()) >= FOREIGN_MESSAGES
