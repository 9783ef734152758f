"""GGUF files: what is read, and that damaged, cut and hostile ones end in one clear error.

Run alone: pytest -n 0 tests/giant/test_gguf.py
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from organs.giant import GGUFError, open_gguf
from organs.giant.formats import FORMATS

gguf = pytest.importorskip("gguf")


def write(path: Path, metadata: dict, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in metadata.items():
        writer.add_array(key, value) if kind == "array" else writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw(
    version: int = 3,
    values: bytes = b"",
    n_values: int = 0,
    tensors: bytes = b"",
    n_tensors: int = 0,
    data: bytes = b"",
) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + values + tensors
    return header + bytes(-len(header) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def opened(tmp_path: Path, data: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return open_gguf(path)


# --- What is there. ---


def test_metadata_and_tensors_are_what_the_gguf_package_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 64)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float16)}
    metadata = {
        "x.int": ("UINT32", 7), "x.negative": ("INT64", -3), "x.float": ("FLOAT32", 0.5), "x.bool": ("BOOL", True),
        "x.text": ("STRING", "naïve"), "x.numbers": ("array", [1, 2, 3]), "x.strings": ("array", ["a", "", "é"]),
    }  # fmt: skip
    with open_gguf(write(tmp_path / "x.gguf", metadata, tensors)) as file:
        assert file.version == 3 and file.architecture == "llama"
        assert file.metadata["x.int"] == 7 and file.metadata["x.negative"] == -3 and file.metadata["x.float"] == 0.5
        assert file.metadata["x.bool"] is True and file.metadata["x.text"] == "naïve"
        assert file.metadata["x.numbers"].tolist() == [1, 2, 3] and file.metadata["x.strings"] == ["a", "", "é"]
        for name, array in tensors.items():
            assert file.tensors[name].shape == array.shape
            assert file.data(name).tobytes() == array.tobytes()
            np.testing.assert_array_equal(file.array(name), array.astype(np.float32))
            out = np.empty(array.nbytes - 4, np.uint8)
            file.read(file.tensors[name], out, 4)
            assert out.tobytes() == array.tobytes()[4:]


def test_values_are_asked_for_by_type(tmp_path):
    with open_gguf(
        write(tmp_path / "x.gguf", {"n": ("UINT32", 7), "t": ("STRING", "7"), "b": ("BOOL", True)}, {})
    ) as file:
        assert file.get("n", int) == 7 and file.get("n", float) == 7.0 and file.get("missing", int, 5) == 5
        for key, kind in (("t", int), ("b", int), ("n", str)):
            with pytest.raises(GGUFError, match=f"{key} is"):
                file.get(key, kind)
        with pytest.raises(GGUFError, match="lacks missing"):
            file.get("missing", int)


def test_a_split_file_is_one_file_given_any_of_its_parts(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    for name in "abc":
        writer.add_tensor(name, np.full(8, ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    with open_gguf(parts[1]) as file:
        assert [float(file.array(name)[0]) for name in "abc"] == [97.0, 98.0, 99.0]
    parts[2].unlink()
    with pytest.raises(GGUFError, match="00003-of-00003"):
        open_gguf(parts[0])
    lone = tmp_path / "renamed.gguf"
    parts[0].rename(lone)
    with pytest.raises(GGUFError, match="one of 3 parts"):
        open_gguf(lone)


# --- What is wrong, in one sentence. ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"GGUF" + bytes(10), "too few"),
        (b"PK" + bytes(50), "no GGUF"),
        (b"FUGG" + bytes(50), "big-endian"),
        (raw(version=1), "version 1"),
        (raw(version=3 << 24), "big-endian"),
        (raw(n_tensors=1 << 60), "do not fit"),
        (raw(n_values=1 << 40), "do not fit"),
        (raw(values=text("k") + struct.pack("<I", 99), n_values=1), "unknown type 99"),
        (raw(values=struct.pack("<Q", 1 << 62) + bytes(20), n_values=1), "do not fit"),
        (raw(values=text("k") + struct.pack("<IIQ", 9, 4, 1 << 61), n_values=1), "do not fit"),
        (raw(values=text("k") + struct.pack("<IIQ", 9, 8, 1 << 61), n_values=1), "do not fit"),
        (raw(values=text("k") + struct.pack("<IIQIQIQIQIQ", 9, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1) + bytes(99), n_values=1), "deeper"),
        (raw(values=2 * (text("k") + struct.pack("<IB", 0, 1)), n_values=2), "twice"),
        (raw(values=text("general.alignment") + struct.pack("<II", 4, 24), n_values=1), "power of two"),
        (raw(values=text("general.alignment") + struct.pack("<II", 4, 0), n_values=1), "power of two"),
        (raw(tensors=entry("t", (8,), 0, 0), n_tensors=1), "cut off"),
        (raw(tensors=entry("t", (8,), 0, 1 << 63), n_tensors=1, data=bytes(64)), "cut off"),
        (raw(tensors=entry("t", (8,), 0, 1), n_tensors=1, data=bytes(64)), "multiple of 32"),
        (raw(tensors=entry("t", (8,), 99, 0), n_tensors=1, data=bytes(64)), "number 99; supported are F32"),
        (raw(tensors=entry("t", (256,), 16, 0), n_tensors=1, data=bytes(640)), "IQ2_XXS; supported"),
        (raw(tensors=entry("t", (33,), 2, 0), n_tensors=1, data=bytes(640)), "multiples of 32"),
        (raw(tensors=entry("t", (0,), 0, 0), n_tensors=1, data=bytes(64)), "shape"),
        (raw(tensors=entry("t", (1 << 39, 1 << 39), 0, 0), n_tensors=1, data=bytes(64)), "cut off"),
        (raw(tensors=entry("t", (1, 1, 1, 1, 1), 0, 0), n_tensors=1, data=bytes(64)), "5 dimensions"),
        (raw(tensors=2 * entry("t", (8,), 0, 0), n_tensors=2, data=bytes(64)), "twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, data, message):
    with pytest.raises(GGUFError, match=message) as caught:
        opened(tmp_path, data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_file_and_a_folder_are_errors_of_the_same_kind(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError):
            open_gguf(path)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path):
    path = write(tmp_path / "x.gguf", {}, {"a": np.ones(4096, np.float32)})
    with open_gguf(path) as file:
        os.truncate(path, path.stat().st_size - 8192)
        with pytest.raises(GGUFError, match="cut after it was opened"):
            file.read(file.tensors["a"], np.empty(16384, np.uint8))


@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
def test_any_bytes_behind_a_header_are_a_file_or_an_error(tmp_path_factory, data, n_tensors, n_values):
    path = tmp_path_factory.mktemp("any") / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + data)
    try:
        open_gguf(path).close()
    except GGUFError:
        pass


# --- Ten thousand mutations of a small model. ---


def mutations(data: bytes, count: int, seed: int, weights: int):
    """Copies with a few bytes changed, an integer replaced by an extreme one, or the end cut off; mostly in the header."""
    rng = np.random.default_rng(seed)
    header = len(data) - weights
    extremes = [0, 1, 2, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    for _ in range(count):
        out, kind = bytearray(data), rng.integers(0, 4)
        where = int(rng.integers(0, header if rng.random() < 0.9 else len(data) - 8))
        if kind == 0:
            out[where] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            for at in rng.integers(0, header, 4):
                out[at] = rng.integers(0, 256)
        elif kind == 2:
            out[where : where + 8] = int(rng.choice(np.array(extremes, np.uint64))).to_bytes(8, "little")
        else:
            del out[where:]
        yield bytes(out)


def try_mutations(model: str, count: int, seed: int, limit_mb: int = 1024) -> dict[str, int]:
    """Open, load and run mutated copies within a limit of memory; what came of them."""
    import resource
    import tempfile
    import warnings

    from organs.giant import Giant

    warnings.simplefilter("ignore")
    data = Path(model).read_bytes()
    with open_gguf(model) as file:
        weights = len(data) - min(t.offset for t in file.tensors.values())
    Giant.load(model, threads=1).logits([1, 2, 3])  # compiled before memory is limited
    used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (limit_mb << 20),) * 2)
    counts = {"refused": 0, "works": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        for mutated in mutations(data, count, seed, weights):
            path.write_bytes(mutated)
            try:
                giant = Giant.load(path, threads=1)
                giant.logits([1, 2, 3])
                giant.close()
                counts["works"] += 1
            except GGUFError:
                counts["refused"] += 1
    return counts


def run_mutations(model: Path, count: int, seed: int) -> str:
    code = f"from tests.giant.test_gguf import try_mutations as t; print(t({str(model)!r}, {count}, {seed}))"
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-2000:]}"
    return result.stdout


def test_mutations_of_a_small_model_end_in_an_error_or_a_model(small_llama):
    run_mutations(small_llama, 300, seed=1)


@pytest.mark.slow
def test_ten_thousand_mutations_of_a_small_model_end_in_an_error_or_a_model(small_llama):
    for seed in range(5):
        print(run_mutations(small_llama, 2000, seed=10 + seed))


def test_every_format_has_a_name_that_the_gguf_package_knows():
    assert {gguf.GGMLQuantizationType[name].value for name in FORMATS} == {form.number for form in FORMATS.values()}
