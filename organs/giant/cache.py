"""The memory of what was read: pages of keys and values, sequences that share them, and a tree of beginnings.

A model with recurrent layers has a state beside its pages, of fixed size, which each token changes; the tree keeps snapshots of
it at some of its pages' ends, and a beginning that is known further than the last snapshot is used up to there.

A page holds the keys and values of PAGE positions, all layers together, and never changes once it is full: so sequences
may share it, and the tree may keep it. Pages are made when they are needed; a sequence's table holds their addresses.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PAGE = 64  # positions; the same as attention.PAGE, which a test checks (this module needs no compiler)


class Page:
    """PAGE positions of one sequence: uint8 [bytes] at a multiple of 64."""

    __slots__ = ("address", "data")

    def __init__(self, nbytes: int):
        raw = np.zeros(nbytes + 64, np.uint8)  # fresh zeros take no memory until they are written
        skip = -raw.ctypes.data % 64
        self.data = raw[skip : skip + nbytes]
        self.address = self.data.ctypes.data

    def copy(self) -> Page:
        other = Page(len(self.data))
        other.data[:] = self.data
        return other


class Snapshot:
    """A recurrent state at some position; a lasting one is not given up for the next."""

    __slots__ = ("is_lasting", "memory")

    def __init__(self, memory: np.ndarray, is_lasting: bool):
        self.memory, self.is_lasting = memory, is_lasting


class Pages:
    """One sequence's pages, and their addresses as compiled code wants them: `table` int64; and its recurrent state: `memory`."""

    def __init__(self, page_bytes: int, memory_bytes: int = 0):
        self.page_bytes, self.pages, self.table = page_bytes, [], np.zeros(8, np.int64)
        self.shared = 0  # so many pages at the beginning belong to others too
        self.memory = Page(memory_bytes).data
        self.snapshots: dict[int, Snapshot] = {}  # by how many tokens came before; until the tree takes them

    def snapshot(self, position: int, is_lasting: bool) -> None:
        """Remember the recurrent state as it is now, after `position` tokens."""
        self.snapshots[position] = Snapshot(self.memory.copy(), is_lasting)

    def take_snapshots(self) -> dict[int, Snapshot]:
        """Those since the last call."""
        taken, self.snapshots = self.snapshots, {}
        return taken

    def reserve(self, positions: int) -> None:
        """Have pages of our own for everything from the last full shared page to `positions`."""
        while len(self.pages) * PAGE < positions:
            self._set(len(self.pages), Page(self.page_bytes))

    def own(self, position: int) -> None:
        """Make the page of `position`, which is about to be written, ours alone."""
        number = position // PAGE
        if number < min(self.shared, len(self.pages)):
            self._set(number, self.pages[number].copy())
            self.shared = number

    def _set(self, number: int, page: Page) -> None:
        if number >= len(self.table):
            self.table = np.concatenate([self.table, np.zeros(len(self.table), np.int64)])
        self.pages[number : number + 1] = [page]
        self.table[number] = page.address

    def adopt(self, pages: Sequence[Page], memory: np.ndarray | None = None) -> None:
        """Begin with pages that others hold too, and a copy of a state; only for an empty sequence."""
        assert not self.pages
        if memory is not None:
            self.memory[:] = memory
        for page in pages:
            self._set(len(self.pages), page)
        self.shared = len(pages)

    def fork(self) -> Pages:
        """A sequence with the same beginning. Both copy a page before they write into one that is shared."""
        other = Pages(self.page_bytes, len(self.memory))
        other.adopt(self.pages, self.memory)
        self.shared = len(self.pages)
        return other

    def truncate(self, positions: int) -> None:
        """Give back the pages behind `positions`. A recurrent state can only go back to nothing."""
        assert positions == 0 or not len(self.memory)
        self.memory[:] = 0
        self.snapshots.clear()
        del self.pages[-(-positions // PAGE) :]
        self.shared = min(self.shared, len(self.pages))


class _Node:
    """One page's tokens in the tree: what follows is keyed by the next page's."""

    __slots__ = ("children", "key", "page", "parent", "snapshot", "used")

    def __init__(self, parent: _Node | None, key: bytes, page: Page | None):
        self.parent, self.key, self.page = parent, key, page
        self.snapshot: Snapshot | None = None  # of the state at the page's end
        self.children: dict[bytes, _Node] = {}
        self.used = 0


class PrefixCache:
    """A tree of full pages keyed by their tokens; when it holds more than `limit` bytes, the longest unused leaves go.

    With a folder, pages are written there as well and come back in a later process (of the same model and kind of cache, by
    `identity`); a file that is damaged is not used. Bytes on disk are limited to `disk_limit`.
    """

    def __init__(self, page_bytes: int, limit: int, folder: Path | None = None, identity: str = "",
                 disk_limit: int = 1 << 30, memory_bytes: int = 0):  # fmt: skip
        self.page_bytes, self.limit, self.folder, self.identity = page_bytes, limit, folder, identity
        self.root, self.clock, self.nbytes, self.disk_limit = _Node(None, b"", None), 0, 0, disk_limit
        self.memory_bytes = memory_bytes
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def find(self, tokens: Sequence[int]) -> list[Page]:
        """The pages of the longest known beginning of `tokens`."""
        return self.resume(tokens)[0]

    def resume(self, tokens: Sequence[int]) -> tuple[list[Page], np.ndarray | None]:
        """The pages of the longest known beginning of `tokens`, and the recurrent state at their end.

        In a model that has one, the beginning ends at the last snapshot.
        """
        node, found, keys = self.root, [], _keys(tokens)
        memory, usable = None, 0
        for depth, key in enumerate(keys):
            child = node.children.get(key)
            if child is None and (page := self._load(keys[: depth + 1])) is not None:
                child = self._insert(node, key, page)
            if child is None or child.page is None:
                break
            self._touch(child)
            found.append(child.page)
            if self.memory_bytes and (state := self._state(child, keys[: depth + 1])) is not None:
                memory, usable = state, depth + 1
            node = child
        return (found[:usable], memory) if self.memory_bytes else (found, None)

    def keep(self, tokens: Sequence[int], pages: Sequence[Page], snapshots: dict[int, Snapshot] | None = None) -> int:
        """Remember the full pages of a sequence, and states by position; returns how many pages there are."""
        node, keys = self.root, _keys(tokens)
        for depth, (key, page) in enumerate(zip(keys, pages, strict=False)):
            child = node.children.get(key)
            if child is None:
                child = self._insert(node, key, page)
                self._save(keys[: depth + 1], page.data, "page")
            if snapshots and (snapshot := snapshots.get((depth + 1) * PAGE)) is not None and child.snapshot is None:
                child.snapshot = snapshot
                self.nbytes += self.memory_bytes
                self._save(keys[: depth + 1], snapshot.memory, "state")
                self._forget_passing(child)
            self._touch(child)
            node = child
        self._shrink()
        return min(len(keys), len(pages))

    def _forget_passing(self, node: _Node) -> None:
        """Writing takes a snapshot at every page: the one before it on the way here goes, unless it was meant to last."""
        above = node.parent
        while above is not None and above.parent is not None and (above.snapshot is None or above.snapshot.is_lasting):
            above = above.parent
        if above is not None and above.snapshot is not None:
            above.snapshot = None
            self.nbytes -= self.memory_bytes

    def _state(self, node: _Node, keys: Sequence[bytes]) -> np.ndarray | None:
        """The recurrent state at a page's end, if it is in memory or on disk."""
        if node.snapshot is not None:
            return node.snapshot.memory
        data = self._load_bytes(keys, self.memory_bytes, "state")
        if data is not None:
            node.snapshot = Snapshot(data, True)
            self.nbytes += self.memory_bytes
        return data

    def clear(self) -> None:
        """Forget everything in memory."""
        self.root, self.nbytes = _Node(None, b"", None), 0

    def _insert(self, parent: _Node, key: bytes, page: Page) -> _Node:
        node = parent.children[key] = _Node(parent, key, page)
        self.nbytes += self.page_bytes
        return node

    def _touch(self, node: _Node) -> None:
        self.clock += 1
        node.used = self.clock

    def _shrink(self) -> None:
        if self.nbytes <= self.limit:
            return
        leaves, waiting = [], [self.root]
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            if not node.children and node.parent is not None:
                leaves.append(node)
        for leaf in sorted(leaves, key=lambda node: node.used):
            node: _Node | None = leaf
            while node is not None and node.parent is not None and not node.children and self.nbytes > self.limit:
                del node.parent.children[node.key]
                self.nbytes -= self.page_bytes + (self.memory_bytes if node.snapshot is not None else 0)
                node = node.parent

    # --- On disk: one file a page, named by all tokens up to its end. ---

    def _name(self, keys: Sequence[bytes], kind: str) -> Path:
        assert self.folder is not None
        h = hashlib.sha256(self.identity.encode())
        for key in keys:
            h.update(key)
        return self.folder / f"{h.hexdigest()[:40]}.{kind}"

    def _save(self, keys: Sequence[bytes], data: np.ndarray, kind: str) -> None:
        if self.folder is None:
            return
        path = self._name(keys, kind)
        if path.exists():
            return
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            self._make_room(len(data))
            temporary.write_bytes(hashlib.sha256(data.tobytes()).digest() + data.tobytes())
            os.replace(temporary, path)
        except OSError:  # a full disk costs time later, nothing else
            temporary.unlink(missing_ok=True)

    def _load_bytes(self, keys: Sequence[bytes], size: int, kind: str) -> np.ndarray | None:
        """uint8 [size], or None where there is no such file, or it is damaged."""
        if self.folder is None:
            return None
        try:
            data = self._name(keys, kind).read_bytes()
        except OSError:
            return None
        if len(data) != 32 + size or hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        return np.frombuffer(data, np.uint8, size, 32)

    def _load(self, keys: Sequence[bytes]) -> Page | None:
        data = self._load_bytes(keys, self.page_bytes, "page")
        if data is None:
            return None
        page = Page(self.page_bytes)
        page.data[:] = data
        return page

    def _make_room(self, nbytes: int) -> None:
        assert self.folder is not None
        files = [p for kind in ("page", "state") for p in self.folder.glob(f"*.{kind}")]
        files.sort(key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in files) + nbytes
        for path in files:
            if total <= self.disk_limit:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _keys(tokens: Sequence[int]) -> list[bytes]:
    """The tokens of each full page, as bytes."""
    array = np.asarray(tokens, np.int64)
    return [array[i : i + PAGE].tobytes() for i in range(0, len(array) - PAGE + 1, PAGE)]
