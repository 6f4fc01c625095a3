import errno
import hashlib
import os
import uuid

import fsspec
import pytest

from dlrm.checkpoint import store as stores
from dlrm.checkpoint.manifest import File
from dlrm.checkpoint.store import LocalStore, RemoteStore, open_store
from dlrm.errors import CheckpointError


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    if request.param == "local":
        yield open_store(str(tmp_path / "a folder"))
        return
    address = f"memory://{uuid.uuid4().hex}/run"
    yield open_store(address)
    fsspec.filesystem("memory").store.clear()


def save(store, name, token="aa", **files):
    written = store.begin(name, token)
    for file, content in files.items():
        with store.create(written, f"{file}.json") as opened:
            opened.write(content)
    store.finish(written, name)
    return written


def read(store, name, file):
    with store.open(name, file) as opened:
        return opened.read()


def test_nothing_is_there_yet(store):
    assert store.names() == []
    assert store.leftovers() == []


def test_a_checkpoint_from_its_beginning_to_its_end(store):
    save(store, "step_0000000005", manifest=b"one", config=b"two")
    assert store.names() == ["step_0000000005"]
    assert store.leftovers() == []
    assert read(store, "step_0000000005", "manifest.json") == b"one"
    assert read(store, "step_0000000005", "config.json") == b"two"
    with pytest.raises(FileNotFoundError):
        store.open("step_0000000005", "plan.json")
    store.remove("step_0000000005")
    assert store.names() == []


def test_one_that_is_not_finished_is_a_leftover(store):
    save(store, "step_0000000005", manifest=b"")
    written = store.begin("step_0000000010", "bb")
    with store.create(written, "rank_0.bin") as opened:
        opened.write(b"half")
    assert store.leftovers() == [written]
    for name in store.leftovers():
        store.remove(name)
    assert store.names() == ["step_0000000005"]


def test_a_file_knows_its_size_and_digest(store, monkeypatch):
    monkeypatch.setattr(stores, "_PIECE_BYTES", 7)
    written = store.begin("step_0000000005", "aa")
    with store.create(written, "rank_0.bin") as opened:
        opened.write(b"0123456789" * 3)
        opened.write(memoryview(b"").cast("B"))
        opened.write(memoryview(bytes(8)).cast("d"))
    content = b"0123456789" * 3 + bytes(8)
    assert opened.facts == File(38, hashlib.sha256(content).hexdigest())
    store.finish(written, "step_0000000005")
    assert read(store, "step_0000000005", "rank_0.bin") == content


def test_whether_it_can_be_written_leaves_nothing(store, tmp_path):
    store.check_writable()
    assert store.names() == []
    assert list(tmp_path.iterdir()) == []
    save(store, "step_0000000005", manifest=b"")
    store.check_writable()
    assert store.names() == ["step_0000000005"]


def test_which_kind_of_store_an_address_has(tmp_path):
    for address in (str(tmp_path), "relative/folder", f"file://{tmp_path}", f"local://{tmp_path}"):
        assert isinstance(open_store(address), LocalStore)
        assert open_store(address).address == address
    save(open_store(f"file://{tmp_path}"), "step_0000000005", manifest=b"")
    assert (tmp_path / "step_0000000005" / "manifest.json").exists()
    assert isinstance(open_store("memory://somewhere"), RemoteStore)


@pytest.mark.parametrize(
    ("address", "words"), [("nosuch://a/b", "nosuch://a/b: Protocol not known"), ("s3://a/b", "s3://a/b: Install s3fs")]
)
def test_an_address_of_no_kind(address, words):
    with pytest.raises(CheckpointError, match=words):
        open_store(address)


def test_a_folder_in_which_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_store(str(tmp_path / "file" / "checkpoints")).check_writable()


def test_unfinished_checkpoints_of_a_folder_have_another_name(tmp_path):
    store = open_store(str(tmp_path))
    written = store.begin("step_0000000005", "aa")
    assert written == ".step_0000000005.aa.partial"
    assert store.names() == [written]
    with store.create(written, "manifest.json") as opened:
        opened.write(b"")
    with pytest.raises(FileExistsError), store.create(written, "manifest.json"):
        pass
    store.finish(written, "step_0000000005")
    assert store.names() == ["step_0000000005"]


def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    store, done = open_store(str(tmp_path)), []
    monkeypatch.setattr(os, "fsync", lambda _: done.append(sorted(path.name for path in tmp_path.iterdir())))
    save(store, "step_0000000005", rank_0=b"0", manifest=b"1")
    partial = [".step_0000000005.aa.partial"]
    assert done == [partial, partial, partial, ["step_0000000005"]]  # two files, their folder, and the folder above


def test_nothing_behind_a_link_is_read_or_removed(tmp_path):
    store = open_store(str(tmp_path / "run"))
    save(store, "step_0000000005", manifest=b"mine", config=b"secret")
    folder, elsewhere = tmp_path / "run" / "step_0000000005", tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    (tmp_path / "run" / ".step_0000000010.aa.partial").symlink_to(elsewhere)
    assert store.names() == [".step_0000000010.aa.partial", "step_0000000005"]
    assert store.leftovers() == []
    with pytest.raises(OSError, match="lies behind a link"):
        store.open("step_0000000005", "manifest.json")
    with pytest.raises(OSError, match="is a link"):
        store.remove("step_0000000005")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["config.json", "manifest.json"]


def test_a_link_within_a_checkpoint(tmp_path):
    store = open_store(str(tmp_path / "run"))
    save(store, "step_0000000005", manifest=b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    for name, target in (("rank_0.bin", "file"), ("rank_1.bin", "nothing"), ("rank_2.bin", "")):
        (tmp_path / "run" / "step_0000000005" / name).symlink_to(tmp_path / "elsewhere" / target)
        with pytest.raises(OSError, match="is a link, or no file") as caught:
            store.open("step_0000000005", name)
        assert caught.value.errno == errno.ELOOP
    store.remove("step_0000000005")
    assert store.names() == []
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_a_fifo_is_not_waited_for(tmp_path):
    store = open_store(str(tmp_path))
    save(store, "step_0000000005", config=b"")
    os.mkfifo(tmp_path / "step_0000000005" / "manifest.json")
    with pytest.raises(OSError, match="no file"):
        store.open("step_0000000005", "manifest.json")


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    save(store, "step_0000000005", manifest=b"", rank_0=b"")
    with monkeypatch.context() as patch:
        patch.setattr(stores.shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            store.remove("step_0000000005")
    assert len(store.leftovers()) == len(store.names()) == 1
    save(store, "step_0000000005", manifest=b"again")
    store.remove("step_0000000005")
    assert store.names() == []


def cut_short(path, ignore_errors=False):
    if not ignore_errors:
        raise KeyboardInterrupt


def test_what_a_remote_checkpoint_loses_first_is_its_manifest(monkeypatch):
    store = open_store(f"memory://{uuid.uuid4().hex}")
    save(store, "step_0000000005", manifest=b"", rank_0=b"")
    removed = []
    remove = store._files.rm
    monkeypatch.setattr(store._files, "rm", lambda path, **options: (removed.append(path), remove(path, **options)))
    store.remove("step_0000000005")
    assert removed[0].endswith("step_0000000005/manifest.json")
    assert store.names() == []
