"""Homes and generations: published whole or not at all, whatever happens.   pytest tests/test_home.py"""

import json
import os
import random
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import organism as o

ROOT = Path(o.__file__).resolve().parent


@pytest.fixture
def home(tmp_path):
    opened = o.Home(tmp_path / "home")
    yield opened
    opened.close()


def publish(home, text="body", **state):
    return home.publish({"body.safetensors": text.encode(), "field.npz": b"field"}, state)


def generations(home):
    return sorted(p.name for p in home.body.iterdir() if p.name != "CURRENT")


def fails(pattern, call, *arguments, **options):
    with pytest.raises(o.OrganismError, match=pattern) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


# Homes.


def test_a_new_home_is_private(home):
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert home.latest() is None and home.id is None


def test_a_home_with_something_in_it_keeps_its_permissions(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    tmp_path.chmod(0o755)
    o.Home(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755 and (tmp_path / "notes.txt").read_text() == "mine"


def test_where_the_default_home_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ORGANISM_HOME", str(tmp_path / "mine"))
    assert o.Home.default() == tmp_path / "mine"
    monkeypatch.delenv("ORGANISM_HOME")
    monkeypatch.setattr(o, "__file__", str(tmp_path / "organism.py"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert o.Home.default() == tmp_path / "data" / "organism" / "default"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "pyproject.toml").touch()
    assert o.Home.default() == tmp_path / "checkpoints" / "default"


def test_a_second_process_is_told_who_holds_the_home(home):
    code = "import sys, organism as o\ntry: o.Home(sys.argv[1])\nexcept o.OrganismError as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code, str(home.path)], capture_output=True, text=True, cwd=ROOT)
    assert f"in use by process {os.getpid()}" in run.stdout and run.stderr == ""
    home.close()
    o.Home(home.path).close()


def test_reading_takes_no_lock_and_makes_nothing(home, tmp_path):
    publish(home)
    before = sorted(p.name for p in home.path.rglob("*"))
    reader = o.Home(home.path, read_only=True)
    assert reader.latest().number == 1
    fails("reading only", publish, reader)
    assert sorted(p.name for p in home.path.rglob("*")) == before
    fails("Nothing lives in", o.Home, tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_is_no_home(tmp_path):
    (tmp_path / "file").touch()
    fails("must be a folder", o.Home, tmp_path / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_home_that_may_not_be_written(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if len(folder.parts) > 2:
            folder.chmod(0o755)
    code = "import os, sys, organism as o\nos.setuid(65534)\ntry: o.Home(sys.argv[1])\nexcept o.OrganismError as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "home")], capture_output=True, text=True, cwd=ROOT)
    assert "cannot be written by this user" in run.stdout and run.stderr == ""


def test_a_birth_happens_once(home):
    first = home.birth(dict(seed=np.int64(3), stage="embryo"))
    assert home.birth(dict(seed=4)) == first == home.id and len(first) == 12
    assert home.birth_record["seed"] == 3
    (home.path / "birth.json").write_text("{")
    fails("birth.json cannot be read", lambda: home.id)


# Generations.


def test_what_is_published_is_found_again(home):
    number = home.publish(
        {"a.bin": b"abc", "b.bin": lambda path: path.write_bytes(b"xyz")},
        dict(step=3, loss=np.float32(0.5), seed=2**70),
    )
    home.close()
    again = o.Home(home.path)
    generation = again.latest()
    assert generation.number == number == 1 and generation.path.name == "000001"
    assert generation.state == dict(step=3, loss=0.5, seed=2**70, format=o.GENERATION_FORMAT)
    assert (generation.path / "a.bin").read_bytes() == b"abc" and (generation.path / "b.bin").read_bytes() == b"xyz"
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=generation.path, check=True)
    again.close()


def test_a_kept_file_is_the_same_file(home):
    publish(home)
    home.publish({"body.safetensors": b"new", "field.npz": "keep"}, {})
    one, two = (home.body / n / "field.npz" for n in ("000001", "000002"))
    assert one.samefile(two) and home.latest().number == 2
    home._verified = None
    assert home.latest().number == 2
    with pytest.raises(o.OrganismError):
        home.publish({"nothing.npz": "keep"}, {})
    assert generations(home) == ["000001", "000002"]


def test_a_kept_file_is_copied_where_links_are_not_known(home, monkeypatch):
    publish(home)
    monkeypatch.setattr(o.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    home.publish({"field.npz": "keep"}, {})
    assert (home.latest().path / "field.npz").read_bytes() == b"field"


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "body.safetensors").write_bytes(b"bodx"),
        lambda folder: (folder / "body.safetensors").write_bytes(b""),
        lambda folder: (folder / "field.npz").unlink(),
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "SHA256SUMS").unlink(),
        lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\0garbage"),
        lambda folder: (folder / "SHA256SUMS").write_text(""),
    ],
)
def test_a_damaged_generation_is_set_aside_and_the_one_before_is_used(home, harm, caplog):
    publish(home, "one", step=1)
    publish(home, "two", step=2)
    home.close()
    harm(home.body / "000002")
    with_reader = o.Home(home.path, read_only=True).latest()
    assert with_reader.state["step"] == 1 and generations(home) == ["000001", "000002"]
    again = o.Home(home.path)
    assert again.latest().state["step"] == 1
    assert "damaged" in caplog.text and "the one before it is used" in caplog.text
    aside = [n for n in generations(home) if n.startswith("damaged-000002")]
    assert len(aside) == 1 and (again.body / "CURRENT").read_text() == "000001\n"
    assert publish(again, "three") == 3  # numbers are never used twice
    again.close()


def test_when_nothing_is_intact_there_is_nothing_and_nothing_is_deleted(home):
    publish(home)
    (home.body / "000001" / "field.npz").write_bytes(b"")
    home._verified = None
    assert home.latest() is None
    assert len(generations(home)) == 1 and publish(home) == 2


@pytest.mark.parametrize("text", ["", "garbage", "000077\n", None])
def test_a_lost_pointer_is_mended(home, text):
    publish(home, step=1)
    publish(home, step=2)
    home.close()
    (home.body / "CURRENT").unlink() if text is None else (home.body / "CURRENT").write_text(text)
    again = o.Home(home.path)
    assert again.latest().state["step"] == 2
    assert (again.body / "CURRENT").read_text() == "000002\n"
    again.close()


def rewritten(home, number, change):
    """Change state.json of a generation, with a right checksum."""
    folder = home.body / f"{number:06d}"
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    sums = {n: o._file_digest(folder / n) for n in o._read_sums(folder)}
    (folder / "SHA256SUMS").write_text("".join(f"{d}  {n}\n" for n, d in sums.items()))
    home._verified = None


def test_a_newer_format_is_refused_and_kept(home):
    publish(home)
    rewritten(home, 1, lambda state: state.update(format=99))
    fails("format 99, newer than", home.latest)
    assert generations(home) == ["000001"]


def test_an_older_format_is_migrated(home, monkeypatch):
    monkeypatch.setattr(o, "GENERATION_FORMAT", 1)
    publish(home, name="x")
    monkeypatch.setattr(o, "GENERATION_FORMAT", 3)
    monkeypatch.setattr(o, "GENERATION_MIGRATIONS", {1: lambda s: s | {"two": True}, 2: lambda s: s | {"three": True}})
    home._verified = None
    assert home.latest().state.items() >= dict(name="x", two=True, three=True).items()
    rewritten(home, 1, lambda state: state.pop("format"))
    fails("unknown format 0", home.latest)


def test_old_generations_are_pruned_but_not_the_memorable(home):
    for n in range(1, 41):
        publish(home, lived_bytes=n * 100, keep=n == 17)
    numbers = [int(n) for n in generations(home)]
    assert numbers[-3:] == [38, 39, 40] and 17 in numbers
    doublings = [n for n in numbers if n not in (17, 38, 39, 40)]
    assert doublings == [1, 2, 3, 6, 11, 21]  # the first of each doubling of 100 n bytes
    home.keep_generations = 1
    publish(home, lived_bytes=4100)
    assert [int(n) for n in generations(home)][-1] == 41 and "000040" not in generations(home)


def test_leftovers_of_a_crash_are_cleared(home):
    publish(home, step=1)
    (home.body / ".tmp-1-2").mkdir()
    (home.body / ".tmp-1-2" / "half").touch()
    (home.path / ".tmp-1-birth.json").touch()
    unpublished = home.body / "000002"
    unpublished.mkdir()
    home.close()
    again = o.Home(home.path)
    assert generations(again) == ["000001"] and again.latest().state["step"] == 1
    assert not list(home.path.glob(".tmp*"))
    again.close()


def test_a_failed_publish_changes_nothing(home):
    publish(home, step=1)

    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    fails("disk .* is full", home.publish, {"a": b"a", "b": full}, {})
    with pytest.raises(KeyboardInterrupt):
        home.publish({"b": lambda path: (_ for _ in ()).throw(KeyboardInterrupt)}, {})
    assert generations(home) == ["000001"] and home.latest().state["step"] == 1


KILLED = """if True:
    import os, sys, organism as o
    home = o.Home(sys.argv[1])
    last = home.latest()
    number = last.number if last else 0
    assert last is None or last.state["step"] == number
    print("awake", number, flush=True)
    while True:
        number += 1
        files = {"body.safetensors": os.urandom(200_000), "field.npz": lambda path: path.write_bytes(os.urandom(100_000))}
        if number % 2 == 0:
            files["field.npz"] = "keep"
        assert home.publish(files, dict(step=number, lived_bytes=number)) == number
        print(number, flush=True)
"""


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_nine_at_any_instant_leaves_a_home_that_wakes(tmp_path, kills):
    rng, published = random.Random(kills), 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "home")], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        awake = int(child.stdout.readline().split()[1])
        assert awake >= published  # what was acknowledged is there
        time.sleep(rng.uniform(0, 0.08))
        child.kill()
        lines = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        published = max(awake, int(lines[-1]) if lines else 0)
        generation = o.Home(tmp_path / "home", read_only=True).latest()
        if published:
            assert generation.number in (published, published + 1) and generation.state["step"] == generation.number
    assert published > kills // 2
    assert not list((tmp_path / "home" / "body").glob("damaged-*"))


# Backup.


def lived_in(home):
    home.birth(dict(seed=1))
    (home.path / "organism.toml").write_text("[voice]\ntop_k = 3\n")
    publish(home, step=1)
    with o.Memory(home.path / "memory.db") as memory:
        memory.add_message("user", "The heron is grey.")


def test_a_backup_wakes_elsewhere(home, tmp_path):
    lived_in(home)
    with o.Memory(home.path / "memory.db") as memory:  # while it lives, and is locked
        memory.add_message("user", "Not yet checkpointed.")
        made = o.Home(home.path, read_only=True).backup(tmp_path / "copy.tar.gz")
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path / "other", filter="data")
    other = o.Home(tmp_path / "other")
    assert other.id == home.id and other.latest().state["step"] == 1
    assert o.Config.load(other.path, environ={}).voice.top_k == 3
    with o.Memory(other.path / "memory.db") as memory:
        assert [m.text for m in memory.messages()] == ["The heron is grey.", "Not yet checkpointed."]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.tar.gz", "home", "other"]
    other.close()


def test_a_backup_overwrites_nothing(home, tmp_path):
    lived_in(home)
    (tmp_path / "mine.tar.gz").write_bytes(b"mine")
    fails("exists already", home.backup, tmp_path / "mine.tar.gz")
    fails("no folder", home.backup, tmp_path / "nowhere" / "x.tar.gz")
    assert (tmp_path / "mine.tar.gz").read_bytes() == b"mine"


def test_a_backup_that_fails_leaves_no_half(home, tmp_path, monkeypatch):
    lived_in(home)
    monkeypatch.setattr(
        tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    fails("cannot be written: No space", home.backup, tmp_path / "x.tar.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_nothing_can_be_backed_up_before_birth(home, tmp_path):
    fails("nothing to back up", home.backup, tmp_path / "x.tar.gz")
