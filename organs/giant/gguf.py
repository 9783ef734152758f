"""GGUF files, versions 2 and 3, mapped into memory: metadata, and where each tensor lies. Split files are one file here.

Every size is checked against the file before anything is allocated or read, so a damaged or hostile file ends in a
GGUFError. Layout: the GGUF specification of the ggml project (docs/gguf.md there).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from organs.giant.formats import BY_NUMBER, FORMATS, UNSUPPORTED

T = TypeVar("T")

MAGIC = b"GGUF"
LONGEST_NAME = 65_535  # bytes of a key (the specification's bound), and of a tensor's name
DEEPEST_ARRAY = 4  # arrays of arrays of …
MOST_DIMENSIONS = 4
_SCALARS: dict[int, tuple[str, int]] = {  # type of a value: (format for struct, bytes)
    0: ("<B", 1), 1: ("<b", 1), 2: ("<H", 2), 3: ("<h", 2), 4: ("<I", 4), 5: ("<i", 4),
    6: ("<f", 4), 7: ("<?", 1), 10: ("<Q", 8), 11: ("<q", 8), 12: ("<d", 8),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class GGUFError(ValueError):
    """A file that is no GGUF, is damaged, or holds something that is not supported."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major, as in NumPy: a matrix is [rows, columns], quantised along columns."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int  # bytes from the start of its file
    nbytes: int
    part: int = 0  # which file of a split one


class GGUFFile:
    """An open GGUF. A context manager; the map is closed when nothing looks at it any more.

    `metadata` maps keys to int, float, bool, str, NumPy arrays (of numbers), Strings, and lists (of arrays).
    """

    def __init__(self, parts: list[_Part], path: Path):
        self.path, self._parts = path, parts
        merged: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for key, value in part.metadata.items():
                merged.setdefault(key, value)
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(f"{part.path}: the tensor {name!r} was in an earlier part already")
                self.tensors[name] = info
        self.metadata: Mapping[str, Any] = MappingProxyType(merged)
        self.version = parts[0].version

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; maps that arrays still look at go when those go."""
        for part in self._parts:
            part.close()

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(part.size for part in self._parts)

    @property
    def architecture(self) -> str:
        """general.architecture, such as "llama"."""
        return self.get("general.architecture", str)

    def get(self, key: str, kind: Callable[..., T] | type[T], default: T | None = None) -> T:
        """A value of metadata that must be an int, a float (an int will do), a bool, a str, a list or an array.

        Raises GGUFError where it is missing without a default, or something else.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise GGUFError(f"{self.path}: its metadata lacks {key}")
            return default
        wanted = {float: (int, float), list: (list, Strings)}.get(kind, kind)  # type: ignore[call-overload]
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
            raise GGUFError(f"{self.path}: {key} is {type(value).__name__} {_short(value)}, not {kind.__name__}")
        return float(value) if kind is float else value  # type: ignore[return-value, arg-type]

    def data(self, name: str) -> np.ndarray:
        """uint8 [nbytes]: a view of the map on a tensor's bytes. Raises KeyError for a name that is not there."""
        info = self.tensors[name]
        return self._parts[info.part].view(info.offset, info.nbytes)

    def read(self, info: TensorInfo, out: np.ndarray, begin: int = 0) -> None:
        """Fill `out` (uint8) with a tensor's bytes from `begin` on.

        It reads, so that a failing disk is a GGUFError, where a map would end the process.
        """
        self._parts[info.part].read(info, out, begin)

    def array(self, name: str) -> np.ndarray:
        """float32 of the tensor's shape: dequantised by the reference, which is slow. Raises KeyError."""
        from organs.giant.formats import dequantise

        info = self.tensors[name]
        return dequantise(self.data(name), info.format).reshape(info.shape)


class _Part:
    """One file: its map, and what its header says."""

    def __init__(self, path: Path, number: int = 0):
        self.path, self.number = path, number
        try:
            self.file = open(path, "rb")
            self.size = os.fstat(self.file.fileno()).st_size
            if self.size < 24:
                raise GGUFError(f"{path}: {self.size} bytes are too few for a GGUF file")
            self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise GGUFError(f"{path}: {error.strerror or error}") from error
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            self.map.close()
        except BufferError:  # arrays look at it
            pass
        self.file.close()

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def read(self, info: TensorInfo, out: np.ndarray, begin: int) -> None:
        assert begin + out.nbytes <= info.nbytes
        done, rest = 0, memoryview(out)  # type: ignore[arg-type]
        try:
            while done < out.nbytes:
                count = os.preadv(self.file.fileno(), [rest[done:]], info.offset + begin + done)
                if count == 0:
                    raise GGUFError(
                        f"{self.path}: ended inside of the tensor {info.name!r}; it was cut after it was opened"
                    )
                done += count
        except (OSError, ValueError) as error:
            if isinstance(error, GGUFError):
                raise
            raise GGUFError(f"{self.path}: the tensor {info.name!r} cannot be read: {error}") from error

    def _parse(self) -> None:
        if self.map[:4] != MAGIC:
            hint = "; it is big-endian" if self.map[:4] == MAGIC[::-1] else ""
            raise GGUFError(f"{self.path}: no GGUF file (it begins with {bytes(self.map[:4])!r}){hint}")
        reader = _Reader(self.map, self.size, self.path)
        self.version = reader.scalar("<I", 4)
        if self.version not in (2, 3):
            which = "big-endian" if self.version in (2 << 24, 3 << 24) else f"version {self.version}"
            raise GGUFError(f"{self.path}: GGUF {which}; versions 2 and 3, little-endian, are supported")
        n_tensors, n_values = reader.scalar("<Q", 8), reader.scalar("<Q", 8)
        reader.room(n_tensors, 24, "tensors")
        reader.room(n_values, 13, "values of metadata")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = reader.name("a key")
            if key in self.metadata:
                raise GGUFError(f"{self.path}: the key {key!r} comes twice")
            self.metadata[key] = reader.value(reader.scalar("<I", 4), key)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise GGUFError(f"{self.path}: general.alignment is {_short(alignment)}, not a power of two")
        declared = [reader.tensor() for _ in range(n_tensors)]
        start = -(-reader.at // alignment) * alignment
        self.tensors = {}
        for name, shape, number, offset in declared:
            if name in self.tensors:
                raise GGUFError(f"{self.path}: the tensor {name!r} comes twice")
            self.tensors[name] = self._placed(name, shape, number, offset, start, alignment)

    def _placed(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int, alignment: int
    ) -> TensorInfo:
        where = f"{self.path}: the tensor {name!r}"
        if number not in BY_NUMBER:
            known = UNSUPPORTED.get(number, f"number {number}")
            raise GGUFError(f"{where} has the format {known}; supported are {', '.join(FORMATS)}")
        form = BY_NUMBER[number]
        count = 1
        for size in shape:
            count *= size
        if shape[-1] % form.block:
            raise GGUFError(
                f"{where} has rows of {shape[-1]} numbers, which {form.name} cannot hold (multiples of {form.block})"
            )
        nbytes = count // form.block * form.nbytes
        if offset % alignment:
            raise GGUFError(f"{where} begins at {offset}, which is not a multiple of {alignment}")
        if start + offset + nbytes > self.size:
            raise GGUFError(
                f"{where} needs {start + offset + nbytes:,} bytes, and the file has {self.size:,}; is it cut off?"
            )
        return TensorInfo(name, shape, form.name, start + offset, nbytes, self.number)


_LENGTH = struct.Struct("<Q")


class Strings(Sequence):
    """Strings of a file, read when one of them is asked for; that must be before the file is closed."""

    def __init__(self, data: mmap.mmap, begin: int, count: int):
        self.data, self.begin, self.count = data, begin, count

    @cached_property
    def _read(self) -> list[str]:
        out, at, data, unpack = [], self.begin, self.data, _LENGTH.unpack_from
        for _ in range(self.count):
            end = at + 8 + unpack(data, at)[0]
            out.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        return out

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return self._read[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __eq__(self, other: object) -> bool:
        return self._read == (other._read if isinstance(other, Strings) else other)


class _Reader:
    """Walks over a header; every step is checked against the size of the file."""

    def __init__(self, data: mmap.mmap, size: int, path: Path):
        self.data, self.size, self.path, self.at = data, size, path, 4

    def room(self, count: int, each: int, what: str) -> None:
        """Raise unless `count` things of at least `each` bytes fit into what is left."""
        if count * each > self.size - self.at:
            raise GGUFError(f"{self.path}: {count:,} {what} do not fit into the file; it is cut off or damaged")

    def scalar(self, kind: str, size: int) -> Any:
        self.room(1, size, "numbers")
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.scalar("<Q", 8)
        self.room(length, 1, "bytes of a string")
        text = self.data[self.at : self.at + length].decode("utf-8", "replace")
        self.at += length
        return text

    def name(self, what: str) -> str:
        text = self.string()
        if not 0 < len(text) <= LONGEST_NAME:
            raise GGUFError(f"{self.path}: {what} of {len(text):,} characters")
        return text

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(*_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise GGUFError(f"{self.path}: {key} has a value of the unknown type {kind}")
        if depth >= DEEPEST_ARRAY:
            raise GGUFError(f"{self.path}: {key} nests arrays deeper than {DEEPEST_ARRAY}")
        of, count = self.scalar("<I", 4), self.scalar("<Q", 8)
        if of in _SCALARS:
            format, size = _SCALARS[of]
            self.room(count, size, f"numbers of {key}")
            array = np.frombuffer(self.data, np.dtype(format), count, self.at).copy()
            self.at += count * size
            return array
        if of == _STRING:
            return self.strings(count, key)
        self.room(count, 12, f"values of {key}")
        return [self.value(of, key, depth + 1) for _ in range(count)]

    def strings(self, count: int, key: str) -> Strings:
        """The vocabulary and the merges: hundreds of thousands, so that they are only walked over, without calls of our own."""
        self.room(count, 8, f"strings of {key}")
        begin = at = self.at
        data, unpack = self.data, _LENGTH.unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError) as error:  # the length before was beyond the end
            raise GGUFError(f"{self.path}: a string of {key} is longer than the file") from error
        if at > self.size:
            raise GGUFError(f"{self.path}: a string of {key} is longer than the file")
        self.at = at
        return Strings(data, begin, count)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, number of the format, offset) of one entry."""
        name, dimensions = self.name("a tensor's name"), self.scalar("<I", 4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise GGUFError(f"{self.path}: the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("<Q", 8) for _ in range(dimensions))[::-1]
        if not all(0 < size < 1 << 40 for size in shape):
            raise GGUFError(f"{self.path}: the tensor {name!r} has the shape {shape}")
        return name, shape, self.scalar("<I", 4), self.scalar("<Q", 8)


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Open a GGUF, all parts of it if it is split (given any of them). Raises GGUFError for whatever is wrong with it."""
    first = Path(path)
    parts = [_Part(at, number) for number, at in enumerate(_parts_of(first))]
    try:
        declared = parts[0].metadata.get("split.count", 1)
        if isinstance(declared, int) and declared > 1 and declared != len(parts):
            raise GGUFError(f"{first}: one of {declared} parts; name them NAME-00001-of-{declared:05d}.gguf and so on")
        return GGUFFile(parts, first)
    except BaseException:
        for part in parts:
            part.close()
        raise


def _parts_of(path: Path) -> Iterator[Path]:
    match = _SPLIT.match(path.name)
    if not match:
        yield path
        return
    stem, _, count = match.groups()
    for number in range(1, int(count) + 1):
        yield path.with_name(f"{stem}-{number:05d}-of-{count}.gguf")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "…"
