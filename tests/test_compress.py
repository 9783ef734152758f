"""Compression: the range coder, the walk that a decoder can repeat, the files, and what is wrong with bad ones.

Run alone: pytest -n 0 tests/test_compress.py
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import launcher
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import organism as o
from organs import archive

# A life in fast motion: after a few hundred bytes it has grown twice and takes steps of training.
QUICK = o.Config().replace(
    {
        "tokenizer.start_bytes": 150,
        "tokenizer.first_merges": 12,
        "tokenizer.full_bytes": 600,
        "tokenizer.full_merges": 24,
        "tokenizer.max_merges": 30,
        "field.table_mb": 1,
        "field.contexts": "lite",
        "body.context": 32,
    }
)
TEXT = b"".join(
    b"The heron of the river %d stands in the reeds; the ferry is late, %d times.\n" % (n, n * n) for n in range(60)
)
HOSTILE = [
    b"",
    b"x",
    b"\0" * 300,
    b"\xff\xfe\xfd" * 60,
    bytes(range(256)),
    "naïve — 東京 👩‍👩‍👧 \u202e".encode() * 8,
    b"\xe2\x82" * 40 + b"\xc3",
    b"a" * 400,
    b"\r\n\t \x0b\x0c" * 40,
    b"\x8fORG\x01" * 30,
    b"<|endoftext|><s></s>[BOS]" * 10,
    TEXT[:700],
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Everything here is about numbers that compiled kernels compute."""
    if not o.kernels_ready():
        o.organ("kernels").warm()


def packed(data: bytes, config: o.Config = QUICK, **options) -> bytes:
    return archive.compress(data, config, stage="embryo", **options)


def there_and_back(data: bytes, config: o.Config = QUICK, **options) -> bytes:
    """Compress, decompress, compare; returns the compressed file."""
    blob = packed(data, config, **options)
    assert archive.decompress(blob, config) == data
    return blob


# --- The range coder. ---


def coded(choices: list[tuple[np.ndarray, int]]) -> bytes:
    """The code of (ends, choice) pairs, which is decoded again and compared."""
    encoder = archive.RangeEncoder()
    for ends, choice in choices:
        encoder.put(int(ends[choice - 1]) if choice else 0, int(ends[choice]), int(ends[-1]))
    code = encoder.finish()
    decoder = archive.RangeDecoder(code)
    assert [decoder.get(ends) for ends, _ in choices] == [choice for _, choice in choices]
    return code


def bits(choices: list[tuple[np.ndarray, int]]) -> float:
    return sum(-math.log2(float(np.diff(ends, prepend=0)[choice] / ends[-1])) for ends, choice in choices)


def test_a_thousand_random_codes_decode_and_are_no_longer_than_they_must_be():
    rng = np.random.Generator(np.random.PCG64(5))
    for _ in range(1000):
        choices = []
        for _ in range(rng.integers(0, 60)):
            size = int(rng.choice([1, 2, 3, 259, 700]))
            largest = float(rng.choice([2, 1e3, (2**32 - size) / size]))  # totals up to 2^32
            weights = 1 + (rng.random(size) ** rng.choice([1, 8, 40]) * (largest - 1)).astype(np.int64)
            choices.append((np.cumsum(weights), int(rng.integers(size))))
        assert len(coded(choices)) <= bits(choices) / 8 + 1.01


@given(st.lists(st.integers(0, 2), max_size=200))
@example([1] * 30 + [2] * 200 + [0] * 3)
@example([2] * 100)
@example([0] * 100)
def test_carries_run_back_as_far_as_they_must(places):
    """The smallest possible parts at both edges of the range, beside one that is nearly all of it."""
    ends = np.array([1, 2**32 - 1, 2**32])
    coded([(ends, place) for place in places])


def test_a_code_that_ends_too_soon_is_noticed():
    ends = np.array([1, 2, 3, 4])
    decoder = archive.RangeDecoder(coded([(ends, 3)] * 40)[:-4])
    with pytest.raises(archive.CodeEnds):
        for _ in range(200):
            decoder.get(ends)


# --- Round trips. ---


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:12]))
def test_hostile_inputs_come_back(data):
    there_and_back(data)


@given(st.binary(max_size=200) | st.text(max_size=120).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_come_back(data):
    there_and_back(data)


@pytest.mark.slow
def test_a_thousand_random_and_hostile_inputs_come_back():
    rng = random.Random(3)
    for number in range(1000):
        data = rng.choice(HOSTILE) if number % 3 else rng.randbytes(rng.randrange(300))
        for _ in range(rng.randrange(4)):  # cut, repeat, disturb
            at = rng.randrange(len(data) + 1)
            data = rng.choice([data[at:], data[:at], data + data[:at], data[:at] + rng.randbytes(3) + data[at:]])[:900]
        there_and_back(data, seed=number % 7)


@pytest.mark.parametrize(
    "change", [{"body.field": False}, {"body.context": 8}, {"body.context": 130}, {"tokenizer.retrain": "never"}]
)
def test_other_settings_come_back(change):
    there_and_back(TEXT[:900], QUICK.replace(change))


def test_two_threads_come_back():
    there_and_back(TEXT[:900], threads=2)


def test_the_reference_comes_back_and_needs_no_kernels():
    blob = there_and_back(TEXT[:260], engine="numpy")
    assert archive.CodeHeader.unpack(blob, "it")[0].path == archive.CODE_PATHS.index("reference")


def test_weights_that_went_astray_lose_no_text():
    """A rate at which training explodes."""
    with np.errstate(all="ignore"):
        there_and_back(TEXT[:900], QUICK.replace({"learning.rate": 1e30, "learning.max_grad_norm": 0}))


def test_the_same_text_gives_the_same_file_and_another_seed_another():
    one, two, other = packed(TEXT[:900]), packed(TEXT[:900]), packed(TEXT[:900], seed=1)
    assert one == two and one[archive.HEADER.size :] != other[archive.HEADER.size :]


# --- The walk: what is decided depends on bytes already read. ---


def prequential(data: bytes, **options) -> o.Score:
    learner = o.newborn_learner(QUICK, "embryo", engine="auto", threads=1, seed=0)
    return o.Prequential(learner, []).run(data, **options)


@pytest.mark.parametrize("size", [0, 1, 149, 150, 151, 700, len(TEXT)])
def test_the_file_is_as_long_as_the_claim(size):
    claim = prequential(TEXT[:size]).bits / 8
    assert abs(len(packed(TEXT[:size])) - claim) <= 1.5 + 0.001 * claim


def test_where_windows_end_makes_no_difference(monkeypatch):
    whole = packed(TEXT)
    monkeypatch.setattr(o.Prequential, "WINDOW", 700)
    assert packed(TEXT) == whole


def test_the_future_is_not_seen(monkeypatch):
    """Two texts of one length part after 1,500 bytes: until then, and over three growths, all figures agree."""
    monkeypatch.setattr(o.Prequential, "WINDOW", 50)
    one, two = TEXT, TEXT[:1500] + TEXT[:1500:-1] + b"!"
    assert len(one) == len(two)
    curves = []
    for data in (one, two):
        points: list[tuple[int, float]] = []
        prequential(data, curve=lambda size, bpb, points=points: points.append((size, bpb)))
        curves.append(points)
    early = [[point for point in points if point[0] < 1400] for points in curves]
    assert early[0] == early[1] and len(early[0]) > 15 and curves[0][-1] != curves[1][-1]
    codes = [packed(data)[archive.HEADER.size :] for data in (one, two)]
    size, bpb = early[0][-1]
    sure = int(size * bpb / 8) - archive.HEADER.size - 12
    assert sure > 60 and codes[0][:sure] == codes[1][:sure]


def test_the_vocabulary_grows_at_the_first_token_that_reaches_the_point(monkeypatch):
    read_at, grow = [], o.Learner.grow_vocabulary

    def watched(self, merges, past):
        read_at.append(sum(len(data) for data, _ in past()))
        return grow(self, merges, past)

    monkeypatch.setattr(o.Learner, "grow_vocabulary", watched)
    there_and_back(TEXT[:1300])
    points = sorted(n for n in o.growth_points(QUICK.tokenizer) if n < 1300)
    assert len(points) > 2 and read_at[: len(points)] == read_at[len(points) :]
    assert all(0 <= at - point < 48 for at, point in zip(read_at, points, strict=False))


def test_a_claim_counts_the_header():
    assert prequential(b"").bits == 8 * archive.HEADER.size == 8 * len(packed(b""))


# --- The commands. ---


@pytest.fixture
def quick(monkeypatch):
    """The commands with a small newborn."""
    for name, value in dict(BODY_CONTEXT=32, FIELD_TABLE_MB=1, LEARNING_PREQUENTIAL_STAGE="embryo").items():
        monkeypatch.setenv(f"ORGANISM_{name}", str(value))


def command(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the program, run here."""
    code = o.main([*map(str, arguments)])
    return code, *capsys.readouterr()


def refused(capsys, code: int, pattern: str, *arguments) -> None:
    """One sentence, nothing on stdout."""
    exit_code, out, err = command(capsys, *arguments)
    assert (exit_code, out) == (code, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert pattern in err


@pytest.mark.parametrize(
    "data", [b"", b"x", TEXT[:500], b"\xff\x00\xc3(" * 40], ids=["empty", "byte", "text", "binary"]
)
def test_the_commands_give_a_file_back(tmp_path, capsys, quick, data):
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "c").write_bytes(b"what was there before")
    code, out, _ = command(capsys, "compress", tmp_path / "a", "-o", tmp_path / "b", "--json")
    result, compressed = json.loads(out), (tmp_path / "b").stat().st_size
    assert code == 0 and set(result) == {"bytes", "compressed", "bits_per_byte", "seconds"}
    assert (result["bytes"], result["compressed"]) == (len(data), compressed)
    assert result["bits_per_byte"] == 8 * compressed / max(1, len(data))
    code, out, _ = command(capsys, "decompress", tmp_path / "b", "--out", tmp_path / "c", "--json")
    assert code == 0 and (tmp_path / "c").read_bytes() == data and set(json.loads(out)) == set(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_another_process_gives_back_what_crosses_a_growth_and_the_claim_holds(tmp_path, capsys, sample_text):
    (tmp_path / "a").write_bytes(sample_text[:1000])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "organism.toml").write_text("[tokenizer]\nstart_bytes = 600\n[field]\ntable_mb = 1\n")
    mine = ["--stage", "embryo", "--quiet", "--home", tmp_path / "home"]
    command_line = [*launcher.program(), "compress", tmp_path / "a", "-o", tmp_path / "b", *mine]
    subprocess.run(list(map(str, command_line)), check=True, stdout=subprocess.DEVNULL, timeout=300)
    learner = o.newborn_learner(o.Config.load(tmp_path / "home"), "embryo", engine="auto", threads=1, seed=0)
    walk, size = o.Prequential(learner, []), (tmp_path / "b").stat().st_size
    claim = walk.run(sample_text[:1000]).bits / 8
    assert learner.tokenizer.merges and abs(size - claim) <= 1.5 + 0.001 * claim
    assert command(capsys, "decompress", tmp_path / "b", "-o", tmp_path / "c", "--home", tmp_path / "home")[0] == 0
    assert (tmp_path / "c").read_bytes() == sample_text[:1000]


@pytest.mark.slow
def test_a_later_process_reads_what_the_one_wrote_that_compiled_the_kernels(tmp_path, sample_text):
    """22,000 bytes by an embryo of the default settings: the vocabulary grows at 20,000."""
    environment = dict(os.environ, ORGANISM_CACHE=str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(sample_text[:22_000])
    for command_line in ("compress a -o b --stage embryo", "compress a -o again --stage embryo", "decompress b -o c"):
        program = [sys.executable, str(Path(o.__file__).resolve()), *command_line.split()]
        subprocess.run(program, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "c").read_bytes() == sample_text[:22_000]


@pytest.mark.parametrize("name", ["compress", "decompress"])
def test_help_has_an_example(capsys, name):
    code, out, _ = command(capsys, name, "--help")
    assert code == 0 and f"organism {name} " in out.partition("Example:")[2] and "-o, --out PATH" in out


@pytest.fixture
def file(tmp_path, capsys, quick):
    """A compressed file, and beside it an output of before that must survive."""
    (tmp_path / "a").write_bytes(TEXT[:400])
    assert command(capsys, "compress", tmp_path / "a", "-o", tmp_path / "b")[0] == 0
    (tmp_path / "a").unlink()
    return tmp_path / "b"


@pytest.fixture
def refuses(file, capsys):
    """Decompressing fails with one sentence and exit 1, and neither makes nor changes a file."""

    def check(pattern: str, *more) -> None:
        old, new = file.parent / "old", file.parent / "new"
        old.write_bytes(b"old")
        for out in (old, new):
            refused(capsys, 1, pattern, "decompress", file, "-o", out, *more)
        assert old.read_bytes() == b"old" and sorted(p.name for p in file.parent.iterdir()) == ["b", "old"]

    return check


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 20, 43, 44, 45, -1])
def test_a_truncated_file_is_refused(file, refuses, keep):
    file.write_bytes(file.read_bytes()[:keep])
    refuses("truncated or altered")


@pytest.mark.parametrize("content", [b"", b"Just a text.", zlib.compress(TEXT)])
def test_a_file_of_another_kind_is_refused(file, refuses, content):
    file.write_bytes(content)
    refuses("is not a file that `organism compress` made")


def test_any_altered_byte_is_noticed():
    blob = packed(TEXT[:400])
    for at in range(len(blob)):
        for change in (1, 0x80, 0xFF):
            wrong = bytearray(blob)
            wrong[at] ^= change
            with pytest.raises(o.OrganismError):
                archive.CodeHeader.unpack(bytes(wrong), "it")
    with pytest.raises(o.OrganismError, match="altered"):
        archive.CodeHeader.unpack(blob + b"\0", "it")


def test_an_altered_file_is_refused(file, refuses):
    blob = bytearray(file.read_bytes())
    blob[-10] ^= 4
    file.write_bytes(blob)
    refuses("truncated or altered")


def test_a_newer_format_and_another_version_are_refused(file, refuses, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(archive, "__version__", "9.8.7")
        refuses("this is 9.8.7: use that version")
    blob = bytearray(file.read_bytes())
    blob[4] = 2
    file.write_bytes(blob)
    refuses("has format 2")


@pytest.mark.parametrize(
    "what, pattern",
    [("CPU", "another CPU"), ("product", "BLAS"), ("libraries", "numba"), ("path", "ORGANISM_KERNELS=")],
)
def test_a_file_from_another_machine_is_refused(compiled, file, refuses, monkeypatch, what, pattern):
    here = archive.surroundings(True)
    there = "portable" if here["path"] != "portable" else "native"
    monkeypatch.setattr(archive, "surroundings", lambda compiled: here | {what: there if what == "path" else "another"})
    refuses(pattern)


def test_another_cpu_path_is_refused_without_kernels_too(compiled, file, refuses, monkeypatch):
    monkeypatch.setattr(o, "_patient_kernels", lambda: "off")
    refuses("pip install -e .")


def test_other_settings_threads_and_seeds_are_refused(file, refuses, monkeypatch):
    refuses("--threads 1, not 2", "--threads", 2)
    refuses("--seed 0, not 3", "--seed", 3)
    monkeypatch.setenv("ORGANISM_LEARNING_RATE", "0.001")
    refuses("with other settings")


@pytest.mark.parametrize("field, value", [("check", b"another1"), ("length", 10**5), ("length", 100)])
def test_a_file_that_lies_about_its_text_is_refused(file, refuses, field, value):
    header, code = archive.CodeHeader.unpack(file.read_bytes(), "it")
    file.write_bytes(header._replace(**{field: value}).pack(code))
    refuses("does not decode to what it was")


@pytest.mark.parametrize("field, value", [("stage", 200), ("threads", 0), ("threads", 60_000)])
def test_a_header_that_no_program_writes_is_refused(file, refuses, field, value):
    header, code = archive.CodeHeader.unpack(file.read_bytes(), "it")
    file.write_bytes(header._replace(**{field: value}).pack(code))
    refuses("truncated or altered")


def test_files_that_cannot_be_read_or_written(file, capsys, tmp_path):
    refused(capsys, 1, "cannot be read", "compress", tmp_path / "none", "-o", tmp_path / "x")
    refused(capsys, 1, "cannot be read", "decompress", tmp_path / "none", "-o", tmp_path / "x")
    refused(capsys, 1, "its folder", "compress", file, "-o", tmp_path / "none" / "x")
    refused(capsys, 1, "name a file in it", "decompress", file, "-o", tmp_path)
    refused(capsys, 2, "both read and written", "compress", file, "-o", file)
    refused(capsys, 2, "--out", "compress", file)
    refused(capsys, 2, "--seed below 2^32", "compress", file, "-o", tmp_path / "x", "--seed", 2**32)
    refused(capsys, 2, "--stage is for the newborn of --blank", "eval", file, "--stage", "child")
    assert not (tmp_path / "x").exists()


def test_an_interrupt_leaves_no_file(file, capsys, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.Compression, "_take", interrupted)
    assert command(capsys, "decompress", file, "-o", tmp_path / "x")[0] == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_the_header_is_as_documented(compiled):
    """Offsets of docs/compress.md."""
    blob = packed(TEXT[:400], seed=5)
    assert blob[:5] == b"\x8fORG\x01" and len(blob) > archive.HEADER.size == 44
    stage, path, threads, seed = struct.unpack_from("<BBHI", blob, 8)
    assert (stage, threads, seed) == (0, 1, 5) and archive.CODE_PATHS[path] == archive.surroundings(True)["path"]
    assert struct.unpack_from("<Q", blob, 24)[0] == 400
