"""Recording a model: its matrices become panels, its layers rows of one program for the engine.

An architecture (organs/giant/architectures/) calls the methods of `Recorder` in the order in which a token passes through
the model; what a layer has besides (biases, norms of queries and keys, norms behind) is seen by its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from organs.giant import attention, engine, products
from organs.giant.gguf import GGUFError, GGUFFile, TensorInfo
from organs.giant.products import BLOCK, BYTES, PLAIN, ROWS, TILE

SLAB = 8 << 20  # bytes that are read and packed at a time
WORKSPACE = 96 << 20  # bytes that activations of a prompt may take
LONGEST_CHUNK = 512  # tokens of a prompt that are read together


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its metadata says; checked against its tensors when those are packed."""

    architecture: str
    width: int
    layers: int
    queries: int  # heads of queries
    heads: int  # heads of keys and values
    head: int  # numbers of a head
    hidden: int
    vocabulary: int
    context: int
    epsilon: float

    @classmethod
    def of(cls, file: GGUFFile) -> Shape:
        """Raises GGUFError for what is missing or impossible."""
        name = file.architecture
        number = lambda key, default=None: file.get(f"{name}.{key}", int, default)
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GGUFError(f"{file.path}: it lacks the matrix token_embd.weight")
        queries, width = number("attention.head_count"), number("embedding_length")
        if min(queries, width) < 1:
            raise GGUFError(f"{file.path}: {queries} heads and a width of {width} make no model")
        heads = number("attention.head_count_kv", queries)
        head = number("attention.key_length", width // queries)
        layers = number("block_count") - number("nextn_predict_layers", 0)
        hidden = number("feed_forward_length", file.metadata.get(f"{name}.expert_feed_forward_length"))
        shape = cls(name, width, layers, queries, heads, head, hidden,
                    embedding.shape[0], number("context_length"), file.get(f"{name}.attention.layer_norm_rms_epsilon", float))  # fmt: skip
        if min(shape.layers, heads, head, shape.hidden, shape.context) < 1 or queries % max(heads, 1) or head % 2:
            raise GGUFError(f"{file.path}: its sizes make no model: {shape}")
        if number("attention.value_length", head) != head:
            raise GGUFError(f"{file.path}: values of another size than keys are not supported")
        if head > 512 or shape.layers > 10_000 or not 0 < shape.epsilon < 1:
            raise GGUFError(f"{file.path}: its sizes are out of reason: {shape}")
        return shape


@dataclass(frozen=True)
class Rope:
    """Rotation of queries and keys. `split`: a number's partner is half a head away, not its neighbour."""

    frequencies: tuple[float, ...]  # radians a position, of each pair
    magnitude: float = 1.0
    split: bool = True


@dataclass(frozen=True)
class Matrix:
    """A packed matrix; knows its format and where it is."""

    format: str
    rows: int
    columns: int
    data: np.ndarray  # uint8: panels
    device: str = "cpu"

    @property
    def panels(self) -> int:
        return len(self.data) // products.panel_bytes(self.format, self.columns)

    @property
    def blocks(self) -> int:
        return products.blocks(self.format, self.columns)

    @property
    def panel_bytes(self) -> int:
        return products.panel_bytes(self.format, self.columns)


@dataclass
class Activations:
    """Quantised copies of one vector a token: bytes into a thread's own memory or addresses, by form."""

    width: int
    tiles: dict[str, int]
    one: dict[str, int]
    is_shared: bool  # whether `one` are addresses

    @property
    def blocks(self) -> int:
        return -(-self.width // BLOCK)


class Recorder:
    """Collects rows, matrices and memory of a model; `program()` is the result."""

    def __init__(
        self, file: GGUFFile, *, kv_cache: tuple[str, str], threads: int, exact: bool, say: Callable[[str], None] | None = None,
        is_on_disk: bool = False, is_drafting: bool = False,
    ):  # fmt: skip
        self.file, self.shape, self.kinds, self.threads, self.exact = file, Shape.of(file), kv_cache, threads, exact
        s = self.shape
        self.rows: list[dict] = []
        self.kept: list[np.ndarray] = []  # whatever rows point to
        self.pool = ThreadPoolExecutor(max(1, threads))
        self.jobs: list = []
        self.say = say or (lambda text: None)
        self.attention_width = s.queries * s.head
        self.joined = (s.queries + 2 * s.heads) * s.head
        floats = s.width * 2 + self.joined + self.attention_width
        self.chunk = max(
            TILE * 4, min(LONGEST_CHUNK, WORKSPACE // (4 * floats + 3 * (s.hidden + 2 * s.width)) // 16 * 16)
        )
        self.x, self.x_stride = self.buffer(s.width)
        self.qkv, self.qkv_stride = self.buffer(self.joined + ROWS)
        self.out, self.out_stride = self.buffer(self.attention_width)
        self.spare: tuple[int, int] | None = None  # for norms behind, when one is asked for
        self.n_ones = 0
        self.wide(max(s.width, s.hidden, self.attention_width))
        self.own_bytes = 0
        self.left: np.ndarray | None = None  # of the stretch for matrices
        self.activations: dict[tuple[str, int], Activations] = {}
        self.turned: dict[Rope, int] = {}
        self.scratch = 0
        self.token_table: Matrix | None = None
        self.rooms: dict[str, np.ndarray] = {}
        self.page_bytes = 0  # of a page of keys and values; grows with each layer of attention
        self.part = (
            0  # the row where the program began that is being recorded: the model's, then its head's for drafting
        )
        self.is_drafting = is_drafting
        self.head_table: Matrix | None = None
        self.is_on_disk = is_on_disk  # whether experts stay in the file
        self.residency: Any = None  # who brings them (residency.Residency), once a layer has some
        self.memory_bytes = 0  # of a sequence's memory beside pages; grows with each layer that has one
        self.has_state = (
            False  # whether that memory is more than keys of the last page, which are read again where need be
        )
        self.routes: dict[
            int, np.ndarray
        ] = {}  # by layer: the experts that the last step's tokens chose, int64 [chunk, used + 1]
        self.trouble = np.zeros(1, np.int64)  # the number, from 1, of a layer whose router gave no numbers

    # --- Memory. ---

    def keep(self, array: np.ndarray) -> int:
        """Keep an array alive; its address."""
        self.kept.append(array)
        return array.ctypes.data

    def buffer(self, numbers: int) -> tuple[int, int]:
        """Room for so many float32 of every token of a chunk: (address, bytes from token to token)."""
        stride = 4 * -(-numbers // 16) * 16
        return self.keep(products.aligned(stride * self.chunk)), stride

    def room(self, use: str, nbytes: int) -> int:
        """The address of room for one use, shared by all layers, which come one after the other."""
        have = self.rooms.get(use)
        if have is None or len(have) < nbytes:
            assert have is None, f"room for {use} was too small"
            have = self.rooms[use] = products.aligned(nbytes)
            self.kept.append(have)
        return have.ctypes.data

    def wide(self, numbers: int) -> None:
        """Have as many ones as this: factors of what is quantised without a norm."""
        if numbers + BLOCK > self.n_ones:
            self.n_ones = numbers + BLOCK
            self.ones = self.keep(np.ones(self.n_ones, np.float32))

    def buffered(self, use: str, numbers: int) -> tuple[int, int]:
        """As `buffer`, but shared by all layers that name this use."""
        stride = 4 * -(-numbers // 16) * 16
        return self.room(f"{use}, {numbers}", stride * self.chunk), stride

    def own(self, nbytes: int) -> int:
        """Room in each thread's own memory: where it begins."""
        at = self.own_bytes
        self.own_bytes += -(-nbytes // 64) * 64
        return at

    def quantised(self, use: str, width: int, matrices: Sequence[Matrix], is_shared: bool = False) -> Activations:
        """Room for activations in what forms these matrices take; shared by all layers, which come one after the other."""
        a = self.activations.setdefault((use, width), Activations(width, {}, {}, is_shared))
        for form in sorted({self.form(m) for m in matrices}):
            if form not in a.tiles:
                a.tiles[form] = self.keep(products.aligned(self.chunk * a.blocks * BYTES[form]))
        for form in sorted({self.form_of_one(m) for m in matrices}):
            if form not in a.one:
                size = a.blocks * BYTES[form]
                a.one[form] = self.keep(products.aligned(size)) if is_shared else self.own(size)
        return a

    def space(self, nbytes: int) -> np.ndarray:
        """Room for panels, uint8, at a multiple of 64: in one stretch for all matrices, which the kernel may map by huge pages.

        With pages of 4 KB, a token misses the address cache once for each of them, and no prefetch crosses their borders.
        """
        nbytes = -(-nbytes // 64) * 64
        if self.left is None or len(self.left) < nbytes:
            stay = lambda name: self.is_on_disk and "_exps." in name
            sizes = [info.nbytes for name, info in self.file.tensors.items() if not stay(name)]
            wanted = sum(sizes) if self.left is None else 0
            self.left = products.aligned(max(nbytes, wanted))
            self.kept.append(self.left)
        space, self.left = self.left[:nbytes], self.left[nbytes:]
        return space

    # --- Tensors. ---

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of a small tensor. Raises GGUFError where it is missing or has another shape."""
        info = self.info(name, shape)
        from organs.giant.formats import dequantise

        raw = np.empty(info.nbytes, np.uint8)
        self.file.read(info, raw)
        return dequantise(raw, info.format).reshape(shape)

    def vector(self, name: str, numbers: int) -> np.ndarray:
        """float32 [numbers], with zeros behind up to a multiple of 32, since blocks are read whole."""
        out = np.zeros(-(-numbers // BLOCK) * BLOCK, np.float32)
        out[:numbers] = self.array(name, (numbers,))
        return out[:numbers]

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """A tensor's. Raises GGUFError where it is missing or has another shape."""
        info = self.file.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self.file.path}: it lacks the tensor {name}")
        if info.shape != shape and not (shape[0] == 1 and info.shape == shape[1:]):
            raise GGUFError(f"{self.file.path}: {name} has the shape {info.shape}, not {shape}")
        return info

    def matrix(
        self, name: str, rows: int, columns: int, multiple: int = ROWS, order: np.ndarray | None = None,
        of: int | None = None,
    ) -> Matrix:  # fmt: skip
        """Packed, in the background; rows are filled up with zeros to a multiple.

        order: int64 [rows], which rows of a tensor that has `of` rows, and in what order; None: all of them as they come.
        """
        info = self.info(name, (of or rows, columns))
        panels, size = -(-rows // multiple) * multiple // ROWS, products.panel_bytes(info.format, columns)
        data = self.space(panels * size)[: panels * size]
        self._pack(info, rows, columns, np.arange(rows) if order is None else order, data)
        return Matrix(info.format, rows, columns, data)

    def stack(self, name: str, shape: tuple[int, ...], rows: range, multiple: int) -> tuple[Matrix, int]:
        """Those rows of every expert's matrix, of a tensor [experts, rows, columns] or [rows, columns], packed in the background.

        Returns the first expert's matrix, and how many bytes behind it the next one's is.
        """
        info = self.info(name, shape)
        experts, height, columns = (1, *shape)[-3:]
        panels = -(-len(rows) // multiple) * multiple // ROWS
        size = panels * products.panel_bytes(info.format, columns)
        step = -(-size // 64) * 64
        data = self.space(experts * step)
        for i in range(experts):
            self._pack(
                info,
                len(rows),
                columns,
                np.arange(rows.start, rows.stop) + i * height,
                data[i * step : i * step + size],
            )
        return Matrix(info.format, len(rows), columns, data[:size]), step

    def _pack(self, info: TensorInfo, rows: int, columns: int, order: np.ndarray, data: np.ndarray) -> None:
        """Pack rows of a tensor (in this order) into panels, in the background, a slab at a time."""
        size, row_bytes = products.panel_bytes(info.format, columns), info.nbytes // (math.prod(info.shape) // columns)
        panels, full = len(data) // size, -(-rows // ROWS)
        if panels > full:
            data[full * size :] = 0
        step = max(1, SLAB // (ROWS * row_bytes)) * ROWS

        def pack(first: int) -> None:
            wanted = order[first : min(first + step, rows)]
            slab = np.empty(len(wanted) * row_bytes, np.uint8)
            breaks = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1), len(wanted)]
            for a, b in zip(breaks[:-1], breaks[1:]):
                self.file.read(info, slab[a * row_bytes : b * row_bytes], int(wanted[a]) * row_bytes)
            products.pack(slab, info.format, len(wanted), columns, data[first // ROWS * size :])

        self.jobs += [self.pool.submit(pack, first) for first in range(0, rows, step)]

    # --- Rows. ---

    def row(self, operation: str, **fields) -> dict:
        for form in products.QUANTISERS:
            if form != "narrow":
                fields.setdefault(f"one_{form}", -1)
        self.rows.append(dict(fields, operation=engine.address(operation)))
        return self.rows[-1]

    def form(self, matrix: Matrix) -> str:
        """Of the activations of a prompt."""
        return products.form_of(matrix.format, not self.exact)

    def form_of_one(self, matrix: Matrix) -> str:
        """Of a single token's."""
        return products.form_of(matrix.format, False)

    def wanted(self, a: Activations, matrices: Sequence[Matrix]) -> dict:
        """The fields that say in what forms activations are made."""
        return {form: a.tiles[form] for form in map(self.form, matrices)} | {
            f"one_{form}": a.one[form] for form in map(self.form_of_one, matrices)
        }

    def need(self, nbytes: int) -> None:
        self.scratch = max(self.scratch, nbytes)

    def quantise(
        self, use: str, source: tuple[int, int], width: int, matrices: Sequence[Matrix], norm: int = 0, **fields
    ) -> Activations:
        """The row that makes the activations which these matrices take."""
        a = self.quantised(use, width, matrices)
        self.row("quantise", input=source[0], input_stride=source[1], width=width, norm=norm, ones=self.ones,
                 epsilon=self.shape.epsilon, **self.wanted(a, matrices), **fields)  # fmt: skip
        return a

    def kernels(self, matrix: Matrix, suffix: str = "") -> dict:
        """The fields that say which matrix, and by which kernels."""
        many, one = (engine.tile_address(matrix.format, form, T) for form, T in
                     ((self.form(matrix), TILE), (self.form_of_one(matrix), 1)))  # fmt: skip
        return {
            f"weight{suffix}": matrix.data.ctypes.data, f"blocks{suffix}": matrix.blocks,
            f"panel_bytes{suffix}": matrix.panel_bytes, f"kernel{suffix}": many, f"kernel{suffix}_one": one,
        }  # fmt: skip

    def taken(self, a: Activations, matrix: Matrix, suffix: str = "") -> dict:
        """The fields that say which activations are taken."""
        form, one = self.form(matrix), a.one[self.form_of_one(matrix)]
        return {f"tiles{suffix}": a.tiles[form], f"tile_bytes{suffix}": TILE * a.blocks * BYTES[form],
                ("shared" if a.is_shared else f"single{suffix}"): one}  # fmt: skip

    def product(self, a: Activations, matrix: Matrix, target: tuple[int, int], **fields) -> dict:
        return self.row("product", output=target[0], output_stride=target[1], panels=matrix.panels,
                        **self.kernels(matrix), **self.taken(a, matrix), **fields)  # fmt: skip

    # --- What architectures call. ---

    def embed(self, factor: float = 1.0) -> None:
        """A token's row of the table, times a factor."""
        s = self.shape
        table = self.matrix("token_embd.weight", s.vocabulary, s.width)
        self.token_table = table
        self._embed(table, (self.x, self.x_stride), factor)

    def _embed(self, table: Matrix, target: tuple[int, int], factor: float) -> None:
        s = self.shape
        block = BLOCK if table.format in PLAIN else products.FORMATS[table.format].block
        self.need(table.blocks * block * ROWS * 4)
        self.row("embed", output=target[0], output_stride=target[1], width=s.width, factor=factor, weight=table.data.ctypes.data,
                 panel_bytes=table.panel_bytes, blocks=table.blocks, kernel=engine.reader_address(table.format), barrier=1)  # fmt: skip

    def turns(self, rope: Rope | None) -> dict:
        """The fields of attention that say how heads are rotated; cosines and sines are computed once a step."""
        if rope is None:
            return dict(rotated=0)
        if rope not in self.turned:
            count = len(rope.frequencies)
            space, _ = self.keep(products.aligned(8 * count * self.chunk)), None
            frequencies = self.keep(np.array(rope.frequencies, np.float64))
            self.row("angles", output=space, count=count, frequencies=frequencies, magnitude=rope.magnitude)
            self.rows.insert(self.part, self.rows.pop())  # first of all, so that `embed`'s barrier covers it
            self.turned[rope] = space
        return dict(rotated=2 * len(rope.frequencies), split=int(rope.split), angles=self.turned[rope])

    def attention(
        self, layer: int, rope: Rope | None, window: int = 0, cap: float = 0.0, scale: float | None = None,
        is_gated: bool = False, clamp: float = 0.0, behind: str = "post_attention_norm",
    ) -> None:  # fmt: skip
        """x += attention(norm(x)): with biases, norms and sinks where the layer has tensors for them.

        is_gated: the projection of queries gives, for every head, queries and then a gate (of the output, by a sigmoid).
        clamp: queries, keys and values are cut to ±clamp; 0: they are not. behind: the norm of the output, where there is one.
        """
        s, block = self.shape, f"blk.{layer}."
        norm = self.keep(self.vector(block + "attn_norm.weight", s.width))
        rows = {"q": s.queries * s.head, "k": s.heads * s.head, "v": s.heads * s.head}
        matrices, gates = {}, None
        if is_gated:
            heads = np.arange(2 * rows["q"]).reshape(s.queries, 2, s.head)
            of = 2 * rows["q"]
            matrices["q"], gates = (
                self.matrix(block + "attn_q.weight", rows["q"], s.width, order=heads[:, i].reshape(-1), of=of)
                for i in (0, 1)
            )
        for n in rows:
            if n not in matrices:
                matrices[n] = self.matrix(f"{block}attn_{n}.weight", rows[n], s.width)
        a = self.quantise("x", (self.x, self.x_stride), s.width, list(matrices.values()), norm)
        at, gate = self.qkv, (0, 0)
        if gates is not None:
            gate = self.buffered("gate", self.attention_width)
            self.product(a, gates, gate)
        for name, matrix in matrices.items():
            self.product(a, matrix, (at, self.qkv_stride))
            at += 4 * rows[name]
            if (
                matrix.panels * ROWS != rows[name]
            ):  # its last panel reaches into what comes next, which has to be written later
                self.rows[-1]["barrier"] = 1
        self.rows[-1]["barrier"] = 1
        bias = 0
        if self.has(block + "attn_q.bias"):
            bias = self.keep(np.concatenate([self.vector(f"{block}attn_{n}.bias", rows[n]) for n in rows]))
        norms = {"q": 0, "k": 0}
        at = self.qkv
        for n in rows:
            name = f"{block}attn_{n}_norm.weight"
            is_whole = self.has(name) and self.file.tensors[name].shape == (rows[n],) != (s.head,)
            if is_whole or clamp:
                whole = self.keep(self.vector(name, rows[n])) if is_whole else 0
                self.row("normalise", output=at, output_stride=self.qkv_stride, width=rows[n], norm=whole, cap=clamp,
                         epsilon=s.epsilon, barrier=1)  # fmt: skip
            elif self.has(name):
                norms[n] = self.keep(self.vector(name, s.head))
            at += 4 * rows[n]
        sinks = 0
        if self.has(block + "attn_sinks.weight"):
            sinks = self.keep(self.vector(block + "attn_sinks.weight", s.queries))
        width, layout = attention.width_of(s.head), attention.layout_of(*self.kinds, s.head)
        kernels = engine.attention_addresses(*self.kinds).ctypes.data
        groups = s.queries // s.heads
        self.need(64 + 4 * attention.QUERIES * ((groups + 1) * (s.head + width + 3) + attention.PAGE) + 4 * s.head)
        if self.kinds[0] == "q4":
            size = 4 * attention.PAGE * (s.head + (width if self.kinds[1] == "q4" else 0)) * s.heads
            layout |= dict(staged=self.room("staged keys", size * (self.chunk // attention.PAGE + 2)), staged_stride=size,
                           staged_at=self.memory_bytes)  # fmt: skip
            self.memory_bytes += size
        self.row("attention", input=self.qkv, input_stride=self.qkv_stride, output=self.out, output_stride=self.out_stride,
                 queries=s.queries, heads=s.heads, head=s.head, head_width=width, inside=self.page_bytes, sinks=sinks,
                 window=window, bias=bias, query_norm=norms["q"], key_norm=norms["k"],
                 epsilon=s.epsilon, cap=cap, **layout,
                 factor=scale if scale is not None else 1 / math.sqrt(s.head),
                 attention_kernels=kernels, barrier=1, **self.turns(rope))  # fmt: skip
        self.page_bytes += s.heads * layout["stretch"]
        matrix = self.matrix(block + "attn_output.weight", s.width, self.attention_width)
        self.need(4 * self.attention_width + 4 * BLOCK)
        a = self.quantise("attention", (self.out, self.out_stride), self.attention_width, [matrix], merge=1,
                          queries=s.queries, heads=s.heads, head=s.head, head_width=width, sinks=sinks, gate=gate[0],
                          gate_stride=gate[1], value_kind=layout["value_kind"], attention_kernels=kernels)  # fmt: skip
        self._back(a, matrix, block + "attn_output.bias", f"{block}{behind}.weight")

    def feed_forward(self, layer: int, is_gelu: bool = False, norm: str = "ffn_norm") -> None:
        """x += down(act(gate(norm(x))) · up(norm(x)))."""
        s, block = self.shape, f"blk.{layer}."
        weights = self.keep(self.vector(f"{block}{norm}.weight", s.width))
        gate = self.matrix(block + "ffn_gate.weight", s.hidden, s.width, BLOCK)
        up = self.matrix(block + "ffn_up.weight", s.hidden, s.width, BLOCK)
        down = self.matrix(block + "ffn_down.weight", s.width, s.hidden)
        a = self.quantise("x", (self.x, self.x_stride), s.width, [gate, up], weights)
        h = self.quantised("hidden", s.hidden, [down], is_shared=True)
        self.need(256 * TILE)
        self.row("gated", panels=gate.panels, is_gelu=int(is_gelu), ones=self.ones, barrier=1, **self.kernels(gate),
                 **self.kernels(up, "2"), **self.taken(a, gate), **self.taken(a, up, "2"), **self.wanted(h, [down]))  # fmt: skip
        self._back(h, down, block + "ffn_down.bias", block + "post_ffw_norm.weight")

    def _back(self, a: Activations, matrix: Matrix, bias: str, norm: str) -> None:
        """x += product + bias, or x += norm(product + bias) where the layer has such tensors."""
        s = self.shape
        if not self.has(norm):
            self.product(a, matrix, (self.x, self.x_stride), add=1, barrier=1)
            if self.has(bias):
                self.row("add_bias", output=self.x, output_stride=self.x_stride, width=s.width,
                         norm=self.keep(self.vector(bias, s.width)), barrier=1)  # fmt: skip
            return
        if self.spare is None:
            self.spare = self.buffer(s.width)
        self.product(a, matrix, self.spare, barrier=1)
        common = dict(width=s.width, epsilon=s.epsilon, output_stride=self.spare[1], barrier=1)
        if self.has(bias):
            self.row("add_bias", output=self.spare[0], norm=self.keep(self.vector(bias, s.width)), **common)
        self.row("add_normed", input=self.spare[0], input_stride=self.spare[1], output=self.x,
                 norm=self.keep(self.vector(norm, s.width)), **common)  # fmt: skip

    def mixture(self, layer: int, **how: Any) -> None:
        """A feed-forward of experts: experts.feed_forward."""
        from organs.giant import experts

        experts.feed_forward(self, layer, **how)

    def delta_net(self, layer: int, *, is_tiled: bool) -> None:
        """Gated DeltaNet in attention's place: recurrent.mix."""
        from organs.giant import recurrent

        recurrent.mix(self, layer, is_tiled=is_tiled)

    def pair(self, layer: int) -> None:
        """x = eh_proj · [norm(embedding of a token) | norm(state before it)]: the beginning of the program that drafts.

        The states come from where the model's own program puts them.
        """
        assert self.token_table is not None and self.head_table is not None, "the model comes first"
        self.part, self.turned = len(self.rows), {}
        s, block = self.shape, f"blk.{layer}.nextn."
        both = self.buffer(2 * s.width)
        self.wide(2 * s.width)
        self._embed(self.token_table, both, 1.0)
        norms = (self.keep(self.vector(f"{block}{n}.weight", s.width)) for n in ("enorm", "hnorm"))
        self.row("pair", output=both[0], output_stride=both[1], width=s.width, norm=next(norms), weight=next(norms),
                 epsilon=s.epsilon, barrier=1)  # fmt: skip
        matrix = self.matrix(block + "eh_proj.weight", s.width, 2 * s.width)
        self.need(8 * s.width + 4 * BLOCK)
        a = self.quantise("pair", both, 2 * s.width, [matrix])
        self.product(a, matrix, (self.x, self.x_stride), barrier=1)

    def head(self, cap: float = 0.0, norm: str = "output_norm.weight") -> None:
        """Logits: of the last token, or of all; by what norm."""
        s, is_own = self.shape, norm == "output_norm.weight"
        norm_at = self.keep(self.vector(norm, s.width))
        if self.head_table is None:
            has_own = self.has("output.weight")
            self.head_table = self.matrix("output.weight", s.vocabulary, s.width) if has_own else self.token_table
        table = self.head_table
        assert table is not None, "embed comes first"
        common = dict(input=self.x, input_stride=self.x_stride, width=s.width, norm=norm_at, epsilon=s.epsilon)
        if is_own:
            self.row("states", **common)
        a = self.quantise("x", (self.x, self.x_stride), s.width, [table], norm_at, last=1)
        self.product(a, table, (0, 0), last=1, barrier=1)
        if cap > 0:
            self.row("cap", cap=cap, panels=table.panels, barrier=1)
        self.logits_width = table.panels * ROWS

    def program(self) -> np.ndarray:
        """The rows [n] of engine.ROW, when all matrices are packed. Raises GGUFError where one could not be read."""
        try:
            for job in self.jobs:
                job.result()
        finally:
            self.pool.shutdown(cancel_futures=True)
        rows = np.zeros(len(self.rows), engine.ROW)
        for target, fields in zip(rows, self.rows, strict=True):
            for name, value in fields.items():
                target[name] = value
        return rows


# --- RoPE: how fast each pair of a head turns. ---


def rope_of(file: GGUFFile, shape: Shape, *, split: bool, base_key: str = "rope.freq_base", default: float = 10_000.0,
            is_scaled: bool = True, is_rounded: bool = True) -> Rope:  # fmt: skip
    """The rotation that a file's metadata describes; scaling "linear", "ntk", "yarn" and llama3's factors.

    is_rounded: YaRN's ramp begins and ends at whole pairs.

    Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071), as llama.cpp computes it; llama3's factors come as a tensor.
    """
    name = shape.architecture
    rotated = file.get(f"{name}.rope.dimension_count", int, shape.head)
    if not 0 < rotated <= shape.head or rotated % 2:
        raise GGUFError(f"{file.path}: {name}.rope.dimension_count is {rotated}, in heads of {shape.head}")
    base = file.get(f"{name}.{base_key}", float, default)
    if not base > 1:
        raise GGUFError(f"{file.path}: {name}.{base_key} is {base}")
    kind = file.get(f"{name}.rope.scaling.type", str, "none") if is_scaled else "none"
    factor = file.get(f"{name}.rope.scaling.factor", float, 1.0) if is_scaled else 1.0
    if not factor > 0:
        raise GGUFError(f"{file.path}: {name}.rope.scaling.factor is {factor}")
    pairs = np.arange(0, rotated, 2, dtype=np.float64)
    if kind == "ntk":
        base *= factor ** (rotated / max(rotated - 2, 1))
    frequencies, magnitude = base ** (-pairs / rotated), 1.0
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "yarn":
        frequencies, magnitude = _yarn(file, name, frequencies, base, rotated, factor, shape.context, is_rounded)
    elif kind not in ("none", "ntk"):
        raise GGUFError(
            f"{file.path}: RoPE scaling {kind!r} is not supported (linear, ntk, yarn and llama3's factors are)"
        )
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None and is_scaled:
        if factors.shape != (rotated // 2,):
            raise GGUFError(f"{file.path}: rope_freqs.weight has the shape {factors.shape}, not ({rotated // 2},)")
        frequencies = frequencies / np.maximum(file.array("rope_freqs.weight").astype(np.float64), 1e-6)
    return Rope(tuple(float(f) for f in frequencies), magnitude, split)


def _yarn(file: GGUFFile, name: str, frequencies: np.ndarray, base: float, rotated: int, factor: float, context: int,
          is_rounded: bool):  # fmt: skip
    """(frequencies, magnitude): slow pairs are interpolated, fast ones are not, those between are mixed."""
    get = lambda key, default: file.get(f"{name}.rope.scaling.{key}", float, default)
    original = get("original_context_length", context / factor)
    ramp_at = lambda turns: rotated * math.log(max(original, 1) / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = ramp_at(get("yarn_beta_fast", 32.0)), ramp_at(get("yarn_beta_slow", 1.0))
    if is_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0.0, low), min(rotated - 1.0, high)
    interpolated = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0, 1)
    mixed = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return mixed, get("attn_factor", 1.0) * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0)
