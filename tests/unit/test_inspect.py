import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.checkpoint.manifest import MANIFEST
from dlrm.cli import main
from tests.unit.checkpoint_folders import DIM, ROWS, SHARDINGS, VALIDATION, write_checkpoint

USER_ERROR = 2
ROOT = Path(__file__).parents[2]


def inspect_json(capsys, *arguments: str) -> dict:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dlrm inspect: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_facts_of_a_checkpoint(sharding, tmp_path, capsys):
    path = write_checkpoint(tmp_path, blocks=SHARDINGS[sharding], val_auroc=0.75)
    facts = inspect_json(capsys, str(path), "--verify")["checkpoint"]
    size = sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST)
    expected = {
        "step": 20, "epoch": 0, "row": 320, "num_samples": 320, "created": "2026-11-23T10:00:00+0000",
        "data": "ab" * 32, "val_auroc": 0.75, "validation": VALIDATION, "validated_step": 20, "num_bytes": size,
        "num_files": len(list(path.iterdir())) - 1, "world_size": len({block[0] for block in SHARDINGS[sharding]}),
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert [table["name"] for table in facts["tables"]] == ["t_cat_2", "t_cat_10"]
    assert facts["tables"][0] == {
        "name": "t_cat_2", "rows": ROWS, "dim": DIM, "dtype": "float32", "num_bytes": 4 * ROWS * DIM,
        "num_chunks": len(SHARDINGS[sharding]), "optimizer": {"sum": 4 * ROWS},
    }  # fmt: skip
    assert facts["dense"] == {"num_tensors": 2, "num_bytes": 64, "num_parameters": 16}
    assert facts["dense_optimizer"] == {"num_tensors": 1, "num_bytes": 48}
    assert facts["others"] == {"random": {"num_tensors": 1, "num_bytes": 16}}


def test_what_is_shown_of_a_checkpoint(tmp_path, capsys):
    assert main(["inspect", str(write_checkpoint(tmp_path, val_auroc=0.75))]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "step        20 (epoch 0, 320 rows of it taken)" in shown
    assert "samples     320, in 2.5 s of training" in shown
    assert "written     2026-11-23T10:00:00+0000 by 1 rank" in shown
    wanted = "AUROC 0.750000 | log loss 0.500000 | NE 0.900000 | calibration 1.250000 (1,234 samples)"
    assert f"validation  {wanted}" in shown
    rows = [line.split() for line in shown if line.startswith("t_cat_")]
    assert rows == [[name, "37", "12", "float32", "0.0000", "sum", "0.0000"] for name in ("t_cat_2", "t_cat_10")]
    assert "validation  none yet" in text_of(capsys, write_checkpoint(tmp_path, 21))


def text_of(capsys, path: Path) -> list[str]:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("folder", ["run", "a run with spaces", "Läufe/ü 漢字"])
def test_checkpoints_of_a_run_directory(folder, tmp_path, capsys):
    store = tmp_path / folder / "checkpoints"
    write_checkpoint(store, 10, val_auroc=0.8)
    write_checkpoint(store, 20, val_auroc=0.7)
    write_checkpoint(store, 30)
    (write_checkpoint(store, 40) / "rank_1.bin").unlink()
    (write_checkpoint(store, 50) / MANIFEST).unlink()
    cut = write_checkpoint(store, 60) / MANIFEST
    cut.write_bytes(cut.read_bytes()[:500])
    (store / ".step_0000000070.ab.partial").mkdir()
    facts = inspect_json(capsys, str(tmp_path / folder))
    assert facts == inspect_json(capsys, str(store))
    assert facts["checkpoint"]["address"] == f"{store}/step_0000000030"
    assert facts["num_unfinished"] == 1
    assert [(entry["name"], entry.get("why")) for entry in facts["checkpoints"]] == [
        ("step_0000000060", "manifest.json is damaged"),
        ("step_0000000050", "manifest.json is missing: it was not finished"),
        ("step_0000000040", "rank_1.bin: No such file or directory"),
        ("step_0000000030", None),
        ("step_0000000020", None),
        ("step_0000000010", None),
    ]
    marks = [(entry["is_newest"], entry["is_best"]) for entry in facts["checkpoints"] if entry["is_usable"]]
    assert marks == [(True, False), (False, False), (False, True)]
    shown = text_of(capsys, tmp_path / folder)
    assert any(line.startswith("step_0000000010") and line.endswith("best") for line in shown)
    assert f"checkpoint  {store}/step_0000000030" in shown
    assert "1 saving not finished, left out" in shown


def test_only_verify_reads_what_is_in_the_files(tmp_path, capsys):
    path = write_checkpoint(tmp_path, 20)
    write_checkpoint(tmp_path, 10)
    flip(path / "rank_1.bin", 100)
    assert inspect_json(capsys, str(tmp_path))["checkpoint"]["step"] == 20
    assert "rank_1.bin is damaged: its SHA-256 is not the manifest's" in refusal(capsys, str(path), "--verify")
    assert main(["inspect", str(tmp_path), "--verify", "--json"]) == USER_ERROR
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["checkpoint"]["step"] == 10
    assert not facts["checkpoints"][0]["is_usable"]
    assert "1 checkpoint not sound" in captured.err


def test_a_truncated_file_is_seen_without_reading_it(tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    file = path / "rank_1.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert f"rank_1.bin has {size - 1:,} bytes, expected {size:,}" in refusal(capsys, str(path))
    assert "no checkpoint there is sound" in refusal(capsys, str(tmp_path))


def test_paths_that_are_none(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").symlink_to(path)
    (tmp_path / "step_0000000099").symlink_to(path)
    assert "no such folder" in refusal(capsys, str(tmp_path / "gone"))
    assert "no such folder" in refusal(capsys, str(tmp_path / "store" / "step_0000000021"))
    assert "'': no such folder" in refusal(capsys, "")
    assert "is a file" in refusal(capsys, str(path / MANIFEST))
    assert "holds no checkpoint" in refusal(capsys, str(tmp_path / "empty"))
    for link in ("latest", "step_0000000099"):
        assert f"is a link, which is not followed. Give the checkpoint itself: {path}" in refusal(
            capsys, str(tmp_path / link)
        )
    assert "Protocol not known" in refusal(capsys, "nowhere://bucket/run")


def test_a_linked_file_is_not_read(tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    (path / "rank_1.bin").rename(tmp_path / "elsewhere.bin")
    (path / "rank_1.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert "rank_1.bin: is a link" in refusal(capsys, str(path))


def test_the_folder_that_one_is_in(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(write_checkpoint(tmp_path))
    assert inspect_json(capsys, ".")["checkpoint"]["step"] == 20


def test_other_stores(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints", val_auroc=0.5)
    facts = inspect_json(capsys, f"file://{tmp_path}", "--verify")
    assert facts["checkpoint"]["val_auroc"] == 0.5
    assert facts == inspect_json(capsys, f"file://{tmp_path}/checkpoints")


@pytest.mark.parametrize(
    "facts",
    [
        {"world_size": "2"},
        {"created": None, "world_size": [2]},
        {"val_auroc": "high"},
        {"position": {"step": 1}},
        {"position": None},
    ],
)
def test_a_manifest_of_other_types_is_one_line(facts, tmp_path, capsys):
    path = write_checkpoint(tmp_path, **facts)
    if "val_auroc" in facts:
        write_checkpoint(tmp_path, 10)
        assert inspect_json(capsys, str(tmp_path))["checkpoint"]["step"] == 10
    refusal(capsys, str(path))


def test_a_terminal_obeys_no_manifest(tmp_path, capsys):
    path = write_checkpoint(tmp_path, created="\x1b[2Jnow")
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "?[2Jnow" in shown


@pytest.mark.parametrize("command", [["inspect", "{path}", "--verify"], ["export-table", "{path}", "t_cat_2", "{out}"]])
def test_no_torch(command, tmp_path):
    path = write_checkpoint(tmp_path / "store")
    arguments = [part.format(path=path, out=tmp_path / "out.parquet") for part in command]
    code = (
        f"import sys\nfrom dlrm.cli import main\nassert main({arguments!r}) == 0\n"
        "print({'torch', 'torchrec', 'fbgemm_gpu', 'numba'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "set()\n"
