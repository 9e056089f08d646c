"""The cache folder: exchanges that are killed, locks, backups of several kinds, folders that cannot be
written."""
import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from musekit.shards import store
from musekit.shards.command import backups_table
from musekit.shards.rechunk import Layout, rechunk
from musekit.shards.plan import list_shards, verify_shards
from musekit.utils.files import exchange_folders, lock, need_space
from musekit.shards.store import (
    Cache,
    back_up,
    damaged_shard,
    finish_interrupted,
    list_backups,
    new_set,
    restore,
)

LAYOUT = Layout(rows_per_shard=20, rows_per_group=5, num_shards=3)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Two sets of shards, by name, as {name: (folder, shards)}."""
    made = {}
    for name in ("old", "new"):
        folder = tmp_path_factory.mktemp(name)
        source = folder / "source.txt"
        pq.write_table(
            pa.table({"text": [f"{name} text {row}, ".ljust(60 + row, ".") for row in range(90)]}), source
        )
        made[name] = folder / "data", rechunk([source], folder / "data", layout=LAYOUT).shards
    return made


@pytest.fixture
def cache(sets, tmp_path):
    cache = Cache(tmp_path / "cache")
    shutil.copytree(sets["old"][0], cache.data)
    cache.tokenizer.mkdir()
    (cache.tokenizer / "tokenizer.pkl").write_text("of the old set")
    return cache


def set_in_place(folder, sets):
    """The name of the set in a folder, every byte of which was read."""
    present = set(verify_shards(folder, LAYOUT))
    return next(name for name, (_, shards) in sets.items() if set(shards) == present)


EXCHANGES = """
import itertools, shutil, sys
from musekit.utils.files import exchange_folders
from musekit.shards.store import Cache, new_set
cache, how, sets = Cache(sys.argv[1]), sys.argv[2], sys.argv[3:]
exchange = exchange_folders if how == "one step" else lambda one, other: False
for source in itertools.cycle(sets):
    with new_set(cache, exchange) as aside:
        shutil.copytree(source, aside / "data", dirs_exist_ok=True)
        (aside / "tokenizer").mkdir()
        (aside / "tokenizer" / "tokenizer.pkl").write_text(source)
    print(source, flush=True)
"""


@pytest.mark.parametrize("how", ["one step", "renames"])
def test_killed_exchanges(cache, sets, how):
    folders = {name: folder for name, (folder, _) in sets.items()}
    chance, seen, missing = random.Random(how), [], 0
    for _ in range(10):
        command = [sys.executable, "-c", EXCHANGES, cache.folder, how, folders["new"], folders["old"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        missing += not cache.data.exists()
        if how == "one step":
            name = set_in_place(cache.data, sets)  # whole even before anybody mends anything
            if (
                cache.tokenizer.exists()
                and (text := (cache.tokenizer / "tokenizer.pkl").read_text()) != "of the old set"
            ):
                assert text == str(folders[name]), "a tokenizer of the other set stands beside the data"
        finish_interrupted(cache)
        seen.append(set_in_place(cache.data, sets))
        text = (cache.tokenizer / "tokenizer.pkl").read_text()
        assert text in (str(folders[seen[-1]]), "of the old set")
        assert {path.name for path in cache.folder.iterdir()} == {"data", "tokenizer"}
    print(f"{how}: {seen}, data missing until recovery {missing} times")
    assert how == "renames" or missing == 0


class Died(BaseException):
    pass


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("has_data", [True, False])
def test_every_step_can_be_the_last(cache, sets, monkeypatch, atomic, has_data):
    if not has_data:
        shutil.rmtree(cache.data)
    folder, shards = sets["new"]
    pristine = cache.folder.with_name("pristine")
    shutil.copytree(cache.folder, pristine)
    rename, reached_end = os.rename, False
    for limit in itertools.count():
        shutil.rmtree(cache.folder)
        shutil.copytree(pristine, cache.folder)
        left = itertools.count()

        def step(act, *arguments):
            if next(left) == limit:
                raise Died
            return act(*arguments)

        monkeypatch.setattr(os, "rename", lambda *names: step(rename, *names))
        swap = lambda one, other: atomic and step(exchange_folders, one, other)
        try:
            with new_set(cache, swap) as aside:
                shutil.copytree(folder, aside / "data", dirs_exist_ok=True)
            reached_end = True
        except Died:
            pass
        monkeypatch.setattr(os, "rename", rename)
        finish_interrupted(cache)
        names = list_shards(cache.data)
        assert not names and not has_data or set_in_place(cache.data, sets) in ("old", "new")
        if names and set(verify_shards(cache.data, LAYOUT)) == set(shards):
            assert not cache.tokenizer.exists()
        assert not [path for path in cache.folder.iterdir() if path.name not in ("data", "tokenizer")]
        if reached_end:
            break
    assert limit >= 2


def begin(cache, sets, exchange):
    """A new set is written, checked and about to move in; `exchange` takes it from there."""
    with new_set(cache, exchange) as aside:
        shutil.copytree(sets["new"][0], aside / "data", dirs_exist_ok=True)
        (aside / "tokenizer").mkdir()
        (aside / "tokenizer" / "tokenizer.pkl").write_text("of the new set")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after data/ was moved"])
@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV], ids=errno.errorcode.get)
def test_an_exchange_that_the_system_refuses_changes_nothing(cache, sets, monkeypatch, code, late):
    def refuse(*names):
        raise OSError(code, os.strerror(code), *names[:1])

    rename = os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda source, target: (refuse if late and source == cache.next / "data" else rename)(source, target),
    )
    with pytest.raises(OSError, match=f"{os.strerror(code)}.*old set is in place"):
        begin(cache, sets, (lambda *names: False) if late else refuse)
    assert (
        set_in_place(cache.data, sets) == "old"
        and (cache.tokenizer / "tokenizer.pkl").read_text() == "of the old set"
    )
    assert {path.name for path in cache.folder.iterdir()} == {"data", "tokenizer"}
    monkeypatch.setattr(os, "rename", rename)
    begin(cache, sets, exchange_folders)
    assert set_in_place(cache.data, sets) == "new"


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("what", ["a new file", "a touched shard"])
def test_what_was_written_since_the_exchange_does_not_undo_it(cache, sets, exchanged, what):
    def die(one, other):
        exchanged and exchange_folders(one, other)
        raise Died

    with pytest.raises(Died):
        begin(cache, sets, die)
    (cache.data / ("shard_00009.parquet.tmp" if what == "a new file" else list_shards(cache.data)[0])).touch()
    finish_interrupted(cache)
    assert (
        set_in_place(cache.data, sets) == "new"
        and (cache.tokenizer / "tokenizer.pkl").read_text() == "of the new set"
    )
    assert (cache.data / "shard_00009.parquet.tmp").exists() == (exchanged and what == "a new file")


@pytest.mark.parametrize("journal", ["{}", "{", "[]", '{"a": 1}'])
def test_a_journal_that_tells_nothing_moves_nothing(cache, sets, journal):
    shutil.copytree(sets["new"][0], cache.next / "data")
    (cache.next / "journal.json").write_text(journal)
    with pytest.raises(ValueError, match="next is not what its journal.json says"):
        finish_interrupted(cache)
    assert (
        set_in_place(cache.data, sets) == "old"
        and cache.tokenizer.exists()
        and set_in_place(cache.next / "data", sets) == "new"
    )


@pytest.mark.parametrize("step", range(6))
def test_a_tokenizer_is_restored_beside_equal_shards(cache, sets, monkeypatch, step):
    back_up(cache)
    (cache.tokenizer / "tokenizer.pkl").write_text("another")
    rename, left = os.rename, itertools.count()

    def die(*names):
        if next(left) == step:
            raise Died
        rename(*names)

    monkeypatch.setattr(os, "rename", die)
    try:
        restore(cache, "climbmix", skip_backup=True)
    except Died:
        monkeypatch.setattr(os, "rename", rename)
        began = (
            cache.next.exists() or not cache.tokenizer.exists() or (cache.folder / "partial-done").exists()
        )
        finish_interrupted(cache)
        assert began or (cache.tokenizer / "tokenizer.pkl").read_text() == "another"
        if not began:
            return
    assert (
        set_in_place(cache.data, sets) == "old"
        and (cache.tokenizer / "tokenizer.pkl").read_text() == "of the old set"
    )


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    program = (
        "import sys, time; from musekit.utils.files import lock\nwith lock(sys.argv[1]): print(1,"
        " flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"process {process.pid}"), lock(tmp_path):
            pass
        process.kill()
    with lock(tmp_path):
        pass


def test_backups_are_links_and_survive_the_exchange(cache, sets):
    kept = back_up(cache)
    name = list_shards(cache.data)[0]
    assert (kept / "data" / name).samefile(cache.data / name)
    assert not (kept / "tokenizer" / "tokenizer.pkl").samefile(cache.tokenizer / "tokenizer.pkl")
    with new_set(cache) as aside:
        shutil.copytree(sets["new"][0], aside / "data", dirs_exist_ok=True)
    assert set_in_place(kept / "data", sets) == "old" and set_in_place(cache.data, sets) == "new"
    assert restore(cache).name == "climbmix" and set_in_place(cache.data, sets) == "old"
    assert (cache.tokenizer / "tokenizer.pkl").read_text() == "of the old set"
    (cache.tokenizer / "tokenizer.pkl").write_text("written into by another program")
    assert (kept / "tokenizer" / "tokenizer.pkl").read_text() == "of the old set"


def test_backups_are_copies_where_there_are_no_links(cache, sets, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store.os, "link", refuse)
    kept = back_up(cache)
    name = list_shards(cache.data)[0]
    assert (
        not (kept / "data" / name).samefile(cache.data / name) and set_in_place(kept / "data", sets) == "old"
    )


def test_a_killed_backup_is_absent(cache, sets):
    program = """
import sys, time
from musekit.shards import store
link = store._link
def slow(*names):
    link(*names)
    print(1, flush=True)
    time.sleep(0.2)
store._link = slow
store._copy_set.__globals__["_link"] = slow
store.back_up(store.Cache(sys.argv[1]))
"""
    with subprocess.Popen([sys.executable, "-c", program, cache.folder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.kill()
    assert list_backups(cache.folder) == [] and (cache.folder / "partial-backup_climbmix").exists()
    finish_interrupted(cache)
    assert not (cache.folder / "partial-backup_climbmix").exists()
    assert set_in_place(back_up(cache) / "data", sets) == "old"


def old_script_backup(cache, name, data, days_ago):
    """A backup as the earlier script makes it: every one is called the original."""
    folder = cache.backup(name)
    shutil.copytree(data, folder / "data")
    (folder / "source.txt").write_text("climbmix-400b-shuffle\n")
    stamp = time.time() - 86_400 * days_ago
    os.utime(folder / "source.txt", (stamp, stamp))


def test_backups_of_the_earlier_script(cache, sets):
    old_script_backup(cache, "fineweb-edu", sets["old"][0], days_ago=9)  # the original, truly
    old_script_backup(cache, "slimpajama", sets["new"][0], days_ago=3)  # made of fineweb-edu
    backups = list_backups(cache.folder)
    assert [(backup.name, backup.origin, backup.shards) for backup in backups] == [
        ("fineweb-edu", "climbmix", 4),
        ("slimpajama", "climbmix", 4),
    ]
    with new_set(cache) as aside:
        shutil.copytree(sets["new"][0], aside / "data", dirs_exist_ok=True)
    assert restore(cache).name == "fineweb-edu" and set_in_place(cache.data, sets) == "old"
    assert (
        restore(cache, "backup_slimpajama").name == "slimpajama" and set_in_place(cache.data, sets) == "new"
    )


def test_unknown_data_are_not_called_the_original(cache, sets):
    old_script_backup(cache, "fineweb-edu", sets["new"][0], days_ago=9)
    assert back_up(cache).name == "backup_unknown"


def test_unreadable_backups_are_named_and_not_fatal(cache, sets):
    good = back_up(cache)
    (cache.backup("unfinished") / "data").mkdir(parents=True)
    broken = cache.backup("broken-manifest")
    shutil.copytree(good, broken)
    (broken / "data" / "manifest.json").write_text("{")
    cache.backup("file").write_text("")
    listed = cache.backup("list-manifest")
    shutil.copytree(good, listed)
    (listed / "data" / "manifest.json").write_text("[]")
    empty = cache.backup("empty")
    empty.mkdir()
    (empty / "source.txt").write_text("climbmix\n")
    problems = {backup.name: backup.problem for backup in list_backups(cache.folder)}
    assert {name for name, problem in problems.items() if not problem} == {
        "climbmix",
        "broken-manifest",
        "list-manifest",
    } and len(problems) == 6
    assert restore(cache).origin == "climbmix"
    for name in ("unfinished", "file", "empty"):
        with pytest.raises(ValueError, match="cannot be restored"):
            restore(cache, name)
    assert set_in_place(cache.data, sets) == "old"


def shards_of(cache, sets, has_manifest):
    """Backs the old set up, with a manifest or without; the backup, and the path and the content of one of
    its shards."""
    shards = [{"name": shard.name, "sha256": shard.sha256} for shard in sets["old"][1]]
    if has_manifest:
        (cache.data / "manifest.json").write_text(json.dumps({"dataset": "mine", "shards": shards}))
    kept = back_up(cache)
    shard = kept / "data" / list_shards(cache.data)[1]
    content = shard.read_bytes()
    shard.unlink()  # it has a second name in the present set
    return kept, shard, content


DAMAGES = {
    "truncated": lambda content: content[:-30],
    "gone wrong": lambda content: b"?" * len(content),
    "another size": lambda content: content[:4] + content,
    "bytes inside": lambda content: content[:60] + b"?" * 40 + content[100:],
}


@pytest.mark.parametrize("has_manifest", [True, False], ids=["with a manifest", "without"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_not_restored(cache, sets, damage, has_manifest):
    kept, shard, content = shards_of(cache, sets, has_manifest)
    shard.write_bytes(DAMAGES[damage](content))
    refused_and_shown(
        cache, sets, shard, damage in ("truncated", "gone wrong")
    )  # the others show when all of it is read


def test_a_backup_without_a_shard_is_not_restored(cache, sets):
    _, shard, _ = shards_of(cache, sets, has_manifest=True)
    refused_and_shown(cache, sets, shard, True)


def refused_and_shown(cache, sets, shard, shows):
    """Restoring names the shard and changes nothing; the list of backups names it if it `shows`."""
    with pytest.raises(ValueError, match=shard.name):
        restore(cache)
    backup, = list_backups(cache.folder)
    assert (
        damaged_shard(backup) == (shard.name if shows else "")
        and (shard.name in backups_table(cache.folder)) == shows
    )
    assert set_in_place(cache.data, sets) == "old"


def test_a_damaged_set_is_backed_up_once(cache, sets):
    kept, shard, content = shards_of(cache, sets, has_manifest=False)
    shard.write_bytes(content[:-30])
    again = Cache(cache.folder / "again")
    shutil.copytree(kept / "data", again.data)
    assert back_up(again) == back_up(again)


def test_a_damaged_original_is_not_passed_over_for_another(cache, sets):
    kept, shard, content = shards_of(cache, sets, has_manifest=False)
    other = cache.backup("other")
    shutil.copytree(kept, other, copy_function=shutil.copy)
    (other / "data" / shard.name).write_bytes(content)
    (other / "source.txt").write_text("other")
    shard.write_bytes(content[:-30])
    assert [(backup.origin, damaged_shard(backup)) for backup in list_backups(cache.folder)] == [
        ("climbmix", shard.name),
        ("other", ""),
    ]
    with pytest.raises(ValueError, match=f"climbmix.*{shard.name}"):
        restore(cache)
    assert restore(cache, "other").name == "other" and set_in_place(cache.data, sets) == "old"


def test_no_room_for_a_copy_is_one_line(cache, sets, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(store.os, "link", refuse)
    monkeypatch.setattr(store.shutil, "copy2", refuse)
    with pytest.raises(OSError, match="No space left on device: .*shard_00000.parquet") as caught:
        back_up(cache)
    assert not isinstance(caught.value, shutil.Error) and {path.name for path in cache.folder.iterdir()} == {
        "data",
        "tokenizer",
    }


def test_mounted_folders_are_refused(cache, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == cache.data)
    with pytest.raises(
        ValueError, match=f"data is mounted, which cannot be exchanged; mount {cache.folder} instead"
    ):
        Cache(cache.folder)


def test_links_are_refused(cache, tmp_path):
    shutil.move(cache.data, tmp_path / "elsewhere")
    cache.data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        Cache(cache.folder)


def test_space_is_asked_for(tmp_path):
    with pytest.raises(OSError, match="GB are free"):
        need_space(tmp_path, 1e18, "everything")
