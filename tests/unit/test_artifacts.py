import errno
import hashlib
import json
import os
import stat

import pytest

from dlrm.errors import DatasetError
from dlrm.system.files import sha256_of, write_atomically, write_json, write_result, writing


def test_write_atomically_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_everything_as_it_was(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for name in ("pipe", "folder", "device"):
        with pytest.raises(OSError, match="Is a folder, a device or a pipe, not a file") as caught:
            write_atomically(tmp_path / name, lambda _: pytest.fail("was called"))
        assert caught.value.filename == str(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert (tmp_path / "device").is_symlink()


def test_a_link_gives_way_to_a_file(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"old")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert not (tmp_path / "file").is_symlink()
    assert [(tmp_path / name).read_bytes() for name in ("file", "elsewhere")] == [b"new", b"old"]


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"first half, ")
        file.flush()
        assert not path.exists()
        file.write(b"second half")

    write_atomically(path, write)
    assert path.read_bytes() == b"first half, second half"


def test_write_json(tmp_path):
    content = {"name": "AUROC", "values": [0.5, None, True], "nested": {"count": 3}}
    write_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of(size, tmp_path):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_results_go_to_files_and_to_open_ones(tmp_path, capsys):
    write_result(tmp_path / "new" / "result.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"a": 1}
    write_result("-", {"a": 2})
    assert json.loads(capsys.readouterr().out) == {"a": 2}
    reader, writer = os.pipe()
    write_result(f"/dev/fd/{writer}", {"a": 3})
    os.close(writer)
    with os.fdopen(reader) as file:
        assert json.load(file) == {"a": 3}


def test_writing_names_the_file_and_the_remedy(tmp_path):
    output = tmp_path / "days"
    partial, hidden = str(tmp_path / "days.partial" / "a"), str(tmp_path / ".days.x1" / "a")
    words = r"days.partial/a: can't be written \(the disk is full\). Make room\.$"
    with pytest.raises(DatasetError, match=words), writing(output, "Make room."):
        raise OSError(errno.ENOSPC, "No space left on device", partial)
    words = r"/days: can't be written \(the disk quota is used up\)"
    with pytest.raises(DatasetError, match=words), writing(output, "Make room."):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", hidden)
    for other in (None, "/elsewhere", str(tmp_path / "raw" / "a")):
        with pytest.raises(OSError, match="No space"), writing(output, "Make room."):
            raise OSError(errno.ENOSPC, "No space left on device", other)
