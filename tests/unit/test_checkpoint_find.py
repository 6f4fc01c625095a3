import json
import uuid
from dataclasses import replace

import fsspec
import pytest
import torch

from dlrm.checkpoint.checkpoint import RemovedError, UnfinishedError, read_checkpoint
from dlrm.checkpoint.find import Location, best_of, complete_checkpoints, locate, names_to_leave, read_newest
from dlrm.checkpoint.manifest import Chunk, Manifest, Tensor, name_of
from dlrm.checkpoint.restore import find_on_ranks
from dlrm.checkpoint.store import open_store
from dlrm.config.config import CheckpointConfig, Config, TrainingConfig
from dlrm.errors import CheckpointError, MisfitError
from dlrm.ranks.runtime import Runtime

RUNTIME = Runtime(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    if request.param == "local":
        yield open_store(str(tmp_path / "run" / "checkpoints"))
        return
    yield open_store(f"memory://{uuid.uuid4().hex}/run/checkpoints")
    fsspec.filesystem("memory").store.clear()


def save(store, step, *, seed=0, val_auroc=None, finish=True):
    """A checkpoint of a few bytes; one that is not finished has no manifest."""
    name = name_of(step, store.names())
    written, files = store.begin(name, "aa"), {}
    config = Config(training=TrainingConfig(seed=seed))
    contents = {"config.json": json.dumps(config.to_json()).encode(), "rank_0.bin": bytes(range(32))}
    for file, content in contents.items():
        with store.create(written, file) as opened:
            opened.write(content)
        files[file] = opened.facts
    tensors = {"dense.w": Tensor("float32", (8,), (Chunk((0,), (8,), "rank_0.bin", 0),))}
    manifest = Manifest(step, "today", 1, val_auroc, {"step": step}, None, files, tensors)
    if finish:
        with store.create(written, "manifest.json") as opened:
            opened.write(manifest.to_bytes())
        store.finish(written, name)
    return name


def rewrite(store, name, file, change):
    with store.open(name, file) as opened:
        content = change(opened.read())
    if store.address.startswith("memory://"):
        fsspec.filesystem("memory").pipe_file(f"{store.address.removeprefix('memory:/')}/{name}/{file}", content)
    else:
        with open(f"{store.address}/{name}/{file}", "wb") as opened:  # noqa: PTH123 - an address
            opened.write(content)


def flip(content):
    return bytes([*content[:20], content[20] ^ 4, *content[21:]])


def truncate(content):
    return content[:25]


def of_seed(seed):
    def check(manifest, config):
        if config.training.seed != seed:
            raise MisfitError(f"seed {config.training.seed}")

    return check


def newest(store, seed=0):
    notes = []
    return find_on_ranks(Location(store.address), RUNTIME, of_seed(seed), notes.append), notes


def found_at(address, check=None, note=print):
    return find_on_ranks(locate(str(address)), RUNTIME, check or of_seed(0), note)


def test_none_is_there(store):
    with pytest.raises(UnfinishedError, match="no checkpoint there is sound"):
        newest(store)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint|no such folder"):
        locate(store.address)


def test_an_address_that_has_no_folders():
    with pytest.raises(CheckpointError, match="data://x: no address at which a folder can be listed"):
        find_on_ranks(Location("data://x"), RUNTIME, of_seed(0), print)


def test_the_newest_is_taken(store):
    for step in (5, 100, 20):
        save(store, step)
    source, notes = newest(store)
    assert (source.name, source.manifest.step, source.config.training.seed) == ("step_0000000100", 100, 0)
    assert source.address == f"{store.address}/step_0000000100"
    assert notes == []
    assert [found.name for found in complete_checkpoints(store)] == [name_of(100), name_of(20), name_of(5)]


def test_of_a_step_that_was_saved_twice_the_second_is_taken(store):
    assert [save(store, 5), save(store, 5)] == ["step_0000000005", "step_0000000005-1"]
    assert newest(store)[0].name == "step_0000000005-1"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("rank_0.bin", flip, "rank_0.bin is damaged: its SHA-256 is not the manifest's"),
        ("rank_0.bin", truncate, "rank_0.bin has 25 bytes, expected 32"),
        ("manifest.json", flip, "manifest.json is damaged"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("config.json", flip, "config.json is damaged: its SHA-256 is not the manifest's"),
        ("config.json", lambda content: content.replace(b'"seed": 0', b'"seed": 7'), "config.json is damaged"),
        ("config.json", truncate, "config.json has 25 bytes"),
        ("manifest.json", lambda text: text.replace(b'_version": 1', b'_version": 2'), "this dlrm reads 1"),
    ],
)
def test_a_damaged_one_is_left_out_by_auto_and_refused_by_name(store, file, change, words):
    save(store, 5)
    damaged = save(store, 10)
    rewrite(store, damaged, file, change)
    source, notes = newest(store)
    assert source.name == "step_0000000005"
    assert len(notes) == 1
    assert notes[0].startswith(f"Left out {store.address}/step_0000000010: ")
    assert words in notes[0]
    with pytest.raises(CheckpointError, match=words) as caught:
        found_at(f"{store.address}/{damaged}", note=notes.append)
    assert str(caught.value).startswith(f"{store.address}/step_0000000010: ")
    assert caught.value.everywhere


def test_a_file_that_is_missing(store):
    save(store, 5)
    if store.address.startswith("memory://"):
        fsspec.filesystem("memory").rm(f"{store.address.removeprefix('memory:/')}/step_0000000005/rank_0.bin")
    else:
        store.root.joinpath("step_0000000005", "rank_0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"step_0000000005: rank_0.bin"):
        newest(store)


def test_nothing_but_damaged_ones_is_an_error_and_not_a_new_beginning(store):
    for step in (5, 10):
        rewrite(store, save(store, step), "rank_0.bin", flip)
    with pytest.raises(
        CheckpointError, match=r"is sound. step_0000000010: rank_0.bin is damaged.* step_0000000005: rank"
    ):
        newest(store)
    with pytest.raises(CheckpointError, match="no checkpoint there is sound"):
        found_at(store.address)


def test_nothing_but_unfinished_ones_is_a_new_beginning(store):
    save(store, 5, finish=False)
    with pytest.raises(UnfinishedError):
        newest(store)


def test_one_of_another_training(store):
    save(store, 5)
    save(store, 10, seed=1)
    source, notes = newest(store)
    assert source.manifest.step == 5
    assert notes == [f"Left out {store.address}/step_0000000010: seed 1."]
    with pytest.raises(MisfitError, match=r"step_0000000010: seed 1\.$"):
        newest(store, seed=2)
    with pytest.raises(MisfitError, match=r"step_0000000010: seed 1\.$"):
        found_at(f"{store.address}/step_0000000010")


def test_older_ones_of_another_training_are_known(store):
    """They are not this run's to remove."""
    save(store, 5, seed=1)
    save(store, 7)
    save(store, 10)
    rewrite(store, save(store, 20), "rank_0.bin", flip)
    source, notes = newest(store)
    assert source.name == "step_0000000010"
    left = names_to_leave(source, lambda found: of_seed(0)(found.manifest, found.config))
    assert left == ("step_0000000020", "step_0000000005")
    assert len(notes) == 1


def test_one_that_was_renamed(store):
    save(store, 5)
    with store.open("step_0000000005", "manifest.json") as opened:
        manifest = opened.read()
    rewrite(store, save(store, 6), "manifest.json", lambda _: manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json is that of step 5: the folder was renamed"):
        found_at(f"{store.address}/step_0000000006")


def test_a_run_directory_whose_checkpoints_are_elsewhere(tmp_path):
    store = open_store(str(tmp_path / "place"))
    save(store, 5)
    config = Config(checkpoint=CheckpointConfig(checkpoint_dir=store.address))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_json()))
    assert found_at(tmp_path / "run").address == f"{store.address}/step_0000000005"


def test_what_an_address_means(store):
    for step in (5, 10):
        save(store, step)
    run = store.address.removesuffix("/checkpoints")
    for address in (run, f"{run}/", store.address, f"{store.address}/"):
        source = found_at(address)
        assert source.manifest.step == 10
    for address in (f"{store.address}/step_0000000005", f"{store.address}/step_0000000005/"):
        assert found_at(address).manifest.step == 5
    with pytest.raises(CheckpointError, match=r"step_0000000007.: no such folder|step_0000000007: no such checkpoint"):
        found_at(f"{store.address}/step_0000000007")


def test_a_link_is_named_and_not_followed(tmp_path):
    store = open_store(str(tmp_path / "run"))
    save(store, 5)
    (tmp_path / "run" / "step_0000000005").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "step_0000000005").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"step_0000000005: manifest.json: lies behind a link"):
        newest(store)


def test_the_folder_of_checkpoints_may_be_a_link(tmp_path):
    save(open_store(str(tmp_path / "large disk")), 5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large disk")
    for address in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert found_at(address).manifest.step == 5


def test_files_that_the_manifest_does_not_name(store):
    name = save(store, 5)
    checkpoint = read_checkpoint(store, name)
    checkpoint.verify(checkpoint.manifest.files)
    with pytest.raises(CheckpointError, match=r"manifest.json does not name plan.json"):
        checkpoint.verify(["plan.json"])
    with pytest.raises(CheckpointError, match=r"plan.json is missing"):
        checkpoint.read("plan.json")


def test_the_best(store):
    assert best_of([]) is None
    names = [save(store, step, val_auroc=auroc) for step, auroc in ((5, 0.7), (10, 0.8), (15, 0.8), (20, None))]
    there = complete_checkpoints(store)
    assert best_of(there) == names[1]
    assert best_of([replace(found, manifest=replace(found.manifest, val_auroc=None)) for found in there]) is None


def removing(store, name):
    """What a run that trains does to a checkpoint: it writes a newer one, and removes this one."""

    def check(*_):
        if name in store.names():
            save(store, 40)
            store.remove(name)

    return check


def test_of_one_that_is_removed_while_it_is_read_the_next_is_taken(store):
    save(store, 10)
    name = save(store, 20)
    found = found_at(store.address, removing(store, name))
    assert found.manifest.step == 40


def test_one_that_is_named_and_removed_while_it_is_read(store):
    save(store, 10)
    name = save(store, 20)
    with pytest.raises(RemovedError) as refused:
        found_at(f"{store.address}/{name}", removing(store, name))
    assert str(refused.value) == (
        f"{store.address}/{name}: the checkpoint was removed while it was read. A run keeps its newest ones (--keep): "
        "give the run directory, or a copy."
    )


def test_what_is_read_of_one_that_goes_is_read_of_the_newest(store):
    save(store, 10)
    name, notes = save(store, 20), []

    def read(checkpoint):
        removing(store, name)()
        checkpoint.verify(["rank_0.bin"])
        return checkpoint.manifest.step

    assert read_newest(store.address, notes.append, read) == 40
    assert notes == [f"{store.address}/{name} was removed while it was read. Taking the newest one."]
    name = "step_0000000010"
    with pytest.raises(CheckpointError, match=f"{name}: the checkpoint was removed while it was read"):
        read_newest(f"{store.address}/{name}", notes.append, read)
