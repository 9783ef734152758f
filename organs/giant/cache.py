"""The memory of what was read: pages of keys and values, sequences that share them, and a tree of beginnings.

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


class Pages:
    """One sequence's pages, and their addresses as compiled code wants them: `table` int64."""

    def __init__(self, page_bytes: int):
        self.page_bytes, self.pages, self.table = page_bytes, [], np.zeros(8, np.int64)
        self.shared = 0  # so many pages at the beginning belong to others too

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

    def adopt(self, pages: Sequence[Page]) -> None:
        """Begin with pages that others hold too; only for an empty sequence."""
        assert not self.pages
        for page in pages:
            self._set(len(self.pages), page)
        self.shared = len(pages)

    def fork(self) -> Pages:
        """A sequence with the same beginning. Both copy a page before they write into one that is shared."""
        other = Pages(self.page_bytes)
        other.adopt(self.pages)
        self.shared = len(self.pages)
        return other

    def truncate(self, positions: int) -> None:
        """Give back the pages behind `positions`."""
        del self.pages[-(-positions // PAGE) :]
        self.shared = min(self.shared, len(self.pages))


class _Node:
    """One page's tokens in the tree: what follows is keyed by the next page's."""

    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: _Node | None, key: bytes, page: Page | None):
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[bytes, _Node] = {}
        self.used = 0


class PrefixCache:
    """A tree of full pages keyed by their tokens; when it holds more than `limit` bytes, the longest unused leaves go.

    With a folder, pages are written there as well and come back in a later process (of the same model and kind of cache, by
    `identity`); a file that is damaged is not used. Bytes on disk are limited to `disk_limit`.
    """

    def __init__(
        self, page_bytes: int, limit: int, folder: Path | None = None, identity: str = "", disk_limit: int = 1 << 30
    ):
        self.page_bytes, self.limit, self.folder, self.identity = page_bytes, limit, folder, identity
        self.root, self.clock, self.nbytes, self.disk_limit = _Node(None, b"", None), 0, 0, disk_limit
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def find(self, tokens: Sequence[int]) -> list[Page]:
        """The pages of the longest known beginning of `tokens`."""
        node, found, keys = self.root, [], _keys(tokens)
        for depth, key in enumerate(keys):
            child = node.children.get(key)
            if child is None and (page := self._load(keys[: depth + 1])) is not None:
                child = self._insert(node, key, page)
            if child is None or child.page is None:
                break
            self._touch(child)
            found.append(child.page)
            node = child
        return found

    def keep(self, tokens: Sequence[int], pages: Sequence[Page]) -> int:
        """Remember the full pages of a sequence; returns how many there are of them."""
        node, keys = self.root, _keys(tokens)
        for depth, (key, page) in enumerate(zip(keys, pages, strict=False)):
            child = node.children.get(key)
            if child is None:
                child = self._insert(node, key, page)
                self._save(keys[: depth + 1], page)
            self._touch(child)
            node = child
        self._shrink()
        return min(len(keys), len(pages))

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
                self.nbytes -= self.page_bytes
                node = node.parent

    # --- On disk: one file a page, named by all tokens up to its end. ---

    def _name(self, keys: Sequence[bytes]) -> Path:
        assert self.folder is not None
        h = hashlib.sha256(self.identity.encode())
        for key in keys:
            h.update(key)
        return self.folder / f"{h.hexdigest()[:40]}.page"

    def _save(self, keys: Sequence[bytes], page: Page) -> None:
        if self.folder is None:
            return
        path = self._name(keys)
        if path.exists():
            return
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            self._make_room()
            temporary.write_bytes(hashlib.sha256(page.data.tobytes()).digest() + page.data.tobytes())
            os.replace(temporary, path)
        except OSError:  # a full disk costs time later, nothing else
            temporary.unlink(missing_ok=True)

    def _load(self, keys: Sequence[bytes]) -> Page | None:
        if self.folder is None:
            return None
        try:
            data = self._name(keys).read_bytes()
        except OSError:
            return None
        if len(data) != 32 + self.page_bytes or hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        page = Page(self.page_bytes)
        page.data[:] = np.frombuffer(data, np.uint8, self.page_bytes, 32)
        return page

    def _make_room(self) -> None:
        assert self.folder is not None
        files = sorted((p for p in self.folder.glob("*.page")), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in files) + self.page_bytes
        for path in files:
            if total <= self.disk_limit:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _keys(tokens: Sequence[int]) -> list[bytes]:
    """The tokens of each full page, as bytes."""
    array = np.asarray(tokens, np.int64)
    return [array[i : i + PAGE].tobytes() for i in range(0, len(array) - PAGE + 1, PAGE)]
