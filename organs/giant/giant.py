"""A loaded model and its sessions: tokens in, logits out. Text is organs/giant/text.py's concern."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from organs import kernels
from organs.giant.accelerator import Accelerator, device_of, layers_of
from organs.giant.cache import PAGE, Pages, PrefixCache
from organs.giant.gguf import GGUFError, GGUFFile, open_gguf

if TYPE_CHECKING:
    from organs.giant.program import Recorder
    from organs.giant.speculate import Ahead

PREFIX_BYTES = 128 << 20  # what the prefix cache may hold
MOST_THREADS = 8
KV_CACHES = ("f32", "f16", "bf16", "q8", "q4")
_ALIASES = {"fp16": "f16", "bfloat16": "bf16", "q8_0": "q8", "q4k": "q4", "q4_k": "q4", "q4_0": "q4"}


def kinds_of(kv_cache: str) -> tuple[str, str]:
    """(keys, values) of "f16", or of "q8/q4" for different ones. Raises ValueError for what there is not."""
    keys, _, values = kv_cache.lower().partition("/")
    kinds = _ALIASES.get(keys, keys), _ALIASES.get(values or keys, values or keys)
    if any(kind not in KV_CACHES for kind in kinds):
        raise ValueError(
            f"kv_cache is {kv_cache!r}; it can be {', '.join(KV_CACHES)}, or two for keys and values, such as q8/q4"
        )
    return kinds


class ContextFull(ValueError):
    """More tokens than a session's context holds. Nothing was dropped: shorten the prompt, or rewind the session."""


class Giant:
    """A model in memory. Make one by `load`; steps of several Python threads take turns."""

    file: GGUFFile
    vocab_size: int
    context: int  # tokens that a session holds at most
    prefixes: PrefixCache  # what sessions fed, shared by all of them
    accelerator: Accelerator | None  # where all or a part of the model is, with counters; None: on the CPU

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        context: int | None = None,
        kv_cache: str = "f16",
        threads: int | None = None,
        device: str = "cpu",
        offload: str | None = None,
        ram: float | None = None,
        vram: float | None = None,
        prefetch: bool = True,
        exact: bool = False,
        speculate: bool = False,
        prefix_bytes: int | None = None,
        prefix_folder: str | os.PathLike | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Self:
        """Read a GGUF and make it ready.

        context: tokens a session holds at most; None: what the model was trained for.
        kv_cache: "f32", "f16", "bf16", "q8" or "q4", or two for keys and values: "q8/q4".
        threads: None: the CPUs that this process may use, at most eight.
        device: "cpu", "cuda", "mps", or "auto": the first that there is of CUDA, Metal and the CPU (accelerator.py).
        offload: None, "none": everything is on the device. "disk": experts stay in the file and are read when they are wanted.
        "up", "updown", "experts", "layers=N": what an accelerator does not have (placing.py). "auto": measured and chosen.
        ram: with "disk": GB that the process may take (None: half of what the machine has free).
        vram: GB of an accelerator's memory that may be taken (None: what is free).
        prefetch: whether experts that are away are read or copied before they are wanted.
        exact: prompts are read with 16-bit activations, as single tokens always are; slower, and closer to float32.
        speculate: draft tokens by the file's head for multi-token prediction (speculate.py): the same results, `exact` included.
        prefix_bytes, prefix_folder: what the prefix cache may hold in memory (None: 128 MB, and a dozen recurrent states of
        models that have one), and where it keeps a copy on disk.
        say: hears one sentence when kernels have to be compiled first, and why "auto" chose what it did.
        Raises GGUFError for a file that is damaged, not supported or too large, AcceleratorFull where the device cannot hold its
        part, ValueError for settings that are impossible.
        """
        kinds = kinds_of(kv_cache)
        kind, say = device_of(device), say or (lambda text: None)
        layers_of(offload := offload or "none")
        if ram is not None and offload not in ("disk", "auto"):
            raise ValueError("ram is for offload='disk', where experts stay in the file")
        for name, value in (("ram", ram), ("vram", vram)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it is a number of GB")
        for name, value in (("context", context), ("threads", threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        file = open_gguf(path)
        try:
            giant = cls.__new__(cls)
            threads = threads or default_threads()
            giant.accelerator = None if kind == "cpu" else Accelerator(kind, int(1e9 * vram) if vram else None)
            offload = giant._chosen(file, context, kv_cache, threads, offload, ram, say)
            if speculate and giant.accelerator is not None:
                raise ValueError("drafting by the model's own head is for --device cpu")
            exact = exact or speculate
            giant._set_up(file, context, kinds, threads, exact, say, offload, prefetch, speculate)
            if speculate:
                from organs.giant.speculate import check

                check(giant)
            if giant.residency is not None:
                giant.residency.is_prefetching = prefetch
                giant.residency.start(int(1e9 * (ram or free_memory() / 2e9)) - giant._fixed_bytes())
            folder = Path(prefix_folder) if prefix_folder else None
            state = giant._memory_bytes if giant._has_state else 0
            limit = PREFIX_BYTES + 12 * state if prefix_bytes is None else prefix_bytes
            giant.prefixes = PrefixCache(
                giant._page_bytes, limit, folder, giant._identity(kinds, exact), memory_bytes=state
            )
        except BaseException:
            file.close()
            raise
        return giant

    def _chosen(self, file: GGUFFile, context: int | None, kv_cache: str, threads: int, offload: str, ram: float | None,
                say: Callable[[str], None]) -> str:  # fmt: skip
        """The way to load a file, when "auto" has been looked into. Raises GGUFError for a model that does not fit so."""
        from organs.giant import plan

        if self.accelerator is None and offload not in ("none", "disk", "auto"):
            say(f"there is no accelerator: --offload {offload} is as none, all on the CPU")
            offload = "none"
        trained = file.get(f"{file.architecture}.context_length", int)
        sizes = plan.Sizes.of(file, context or min(trained, plan.CONTEXT), kv_cache)
        if offload == "auto":
            found = plan.look(file, sizes, threads, self.accelerator, 1e9 * ram if ram else None)
            best = plan.best_of(found)
            if best is None:
                raise GGUFError(f"{file.path}: it does not fit here in any way; {found[0].reason}")
            say(f"--offload {best.offload}: {best.reason}, about {best.tokens_per_s:.1f} tokens/s")
            return best.offload
        if (message := plan.too_large(sizes, offload, free_memory(), self.accelerator)) is not None:
            raise GGUFError(f"{file.path}: {message}")
        return offload

    def _set_up(
        self, file: GGUFFile, context: int | None, kinds: tuple[str, str], threads: int, exact: bool,
        say: Callable[[str], None], offload: str, is_prefetching: bool, is_drafting: bool,
    ) -> None:  # fmt: skip
        is_cold = not _has_kernels()
        if is_cold:
            say("compiling kernels for this model, once for this machine…")
        from organs.giant import architectures, engine, products
        from organs.giant.program import Recorder

        architectures.check(file)
        if is_cold:
            engine.compile_beside(kinds)
        recorder = Recorder(file, kv_cache=kinds, threads=threads, exact=exact, is_on_disk=offload == "disk",
                            is_drafting=is_drafting)  # fmt: skip
        self._runner = None
        try:
            if self.accelerator is None:
                with contextlib.nullcontext() if is_cold else kernels.collecting_later():  # compiling makes garbage
                    architectures.record(recorder)
                    program = recorder.program()
            else:
                program = self._place(recorder, offload, is_prefetching)
        except BaseException:
            recorder.pool.shutdown(cancel_futures=True)
            raise
        self.file, self.shape, self.threads, self._kept = file, recorder.shape, threads, recorder.kept
        self.vocab_size = recorder.shape.vocabulary
        self.context = min(context or recorder.shape.context, 1 << 24)
        self._memory_bytes, self._has_state = recorder.memory_bytes, recorder.has_state
        self._page_bytes, self._chunk, self._tile = recorder.page_bytes, recorder.chunk, products.TILE
        self._logits_width = recorder.logits_width
        self._logits = products.aligned(4 * self._logits_width * products.TILE, np.float32)
        shape = recorder.shape
        stride = -(-(-(-shape.head // 32) * 32 + 2) // 16) * 16
        self._machines = np.zeros(threads, engine.MACHINE)
        own = [products.aligned(recorder.own_bytes + recorder.scratch + 4096) for _ in range(threads)]
        parts = products.aligned(4 * stride * shape.queries * threads)
        self._kept += [*own, parts]
        self._trouble, self._routes, self.residency = recorder.trouble, recorder.routes, recorder.residency
        self._machines["own"] = [a.ctypes.data for a in own]
        self._machines["scratch"] = recorder.own_bytes
        self._machines["parts"], self._machines["parts_stride"] = parts.ctypes.data, stride
        self._inputs = np.zeros((4, self._chunk), np.int64)
        for row, name in zip(self._inputs, ("tokens", "positions", "tables", "memories"), strict=True):
            self._machines[name] = row.ctypes.data
        self._team = engine.Team(program, self._machines)
        self._rows = recorder.part or len(program)  # of the model; behind them, those of its head for drafting
        self._draft_rows = (recorder.part, len(program)) if recorder.part else None
        if self._draft_rows:
            self._routes.pop(recorder.shape.layers, None)
        self._pace = engine.Pace()
        self._lock = threading.Lock()

    def _place(self, recorder: Recorder, offload: str, is_prefetching: bool) -> np.ndarray:
        """Record a model that is on an accelerator, all or in part; the CPU's program."""
        from organs.giant import architectures
        from organs.giant.placing import Placed, Runner

        assert self.accelerator is not None
        placed = Placed(recorder, self.accelerator, offload, is_prefetching)
        architectures.record(placed)  # type: ignore[arg-type]
        program = placed.program()
        self._runner = Runner(placed, lambda first, end: self._run_rows(first, end))
        return program

    def _run_rows(self, first: int, end: int) -> None:
        self._team.step(first=first, end=end)
        self._check()

    def _identity(self, kinds: tuple[str, str], exact: bool) -> str:
        path = self.file.path
        side = f" {self._runner.accelerator.kind} {self._runner.placed.layers}" if self._runner else ""
        return f"{path.resolve()} {self.file.nbytes} {path.stat().st_mtime_ns} {kinds} {exact} {self._draft_rows}{side}"

    def _fixed_bytes(self) -> int:
        """What the process takes besides experts: matrices, room for activations, and about as much again as an interpreter."""
        from organs.giant import plan

        stretch = max((a.nbytes for a in self._kept), default=0)  # of matrices, which it may not fill
        dense = sum(i.nbytes for n, i in self.file.tensors.items() if "_exps." not in n)
        return dense + sum(a.nbytes for a in self._kept) - stretch + plan.INTERPRETER

    def _sequence(self) -> Pages:
        """Room for a new sequence."""
        if self._runner is not None:
            return self._runner.sequence(self._page_bytes, self._memory_bytes)
        return Pages(self._page_bytes, self._memory_bytes)

    # --- Steps. ---

    def _step(self, tokens: np.ndarray, positions: np.ndarray, sequences: Sequence[Pages], *, together: bool,
              logits: np.ndarray, is_all: bool = False, states: np.ndarray | None = None) -> None:  # fmt: skip
        """Run tokens [n] at their positions; sequences: one for all, or one for each. logits: where rows go."""
        n, m, inputs = len(tokens), self._machines, self._inputs
        inputs[0, :n], inputs[1, :n] = tokens, positions
        inputs[2, :n] = [s.table.ctypes.data for s in sequences]
        inputs[3, :n] = [s.memory.ctypes.data for s in sequences]
        m["n"], m["together"], m["all"] = n, together, is_all
        heads = self.shape.heads
        m["chunks"] = self.threads // int(np.gcd(heads, self.threads)) if n == 1 and positions[0] >= 32 else 1
        m["logits"], m["logits_stride"] = logits.ctypes.data, 4 * self._logits_width
        m["states"] = 0 if states is None else states.ctypes.data
        if self._runner is not None:
            self._runner.step(inputs[0, :n], inputs[1, :n].copy(), sequences, together=together, is_all=is_all,  # type: ignore[arg-type]
                              logits=logits.reshape(-1, self._logits_width), states=states)  # fmt: skip
            return
        if (
            n > 1 or self.threads == 1 or self.residency is not None
        ):  # threads that wait for the disk sleep too, and that is well
            self._team.step(end=self._rows)
            self._check()
            return
        alone, naps, began = self._pace.choose(), self._team.naps, time.perf_counter()
        if alone:
            m["chunks"] = 1
        self._team.step(alone, end=self._rows)
        self._pace.note(alone, time.perf_counter() - began, self._team.naps - naps)
        self._check()

    def _predict(self, tokens: np.ndarray, states: np.ndarray, start: int, pages: Pages) -> None:
        """The head for drafting reads tokens [n] and the states [n, width] before them; logits after the last go to `_logits`."""
        assert self._draft_rows is not None
        states = np.ascontiguousarray(states)
        n, m, inputs = len(tokens), self._machines, self._inputs
        inputs[0, :n], inputs[1, :n] = tokens, np.arange(start, start + n)
        inputs[2, :n], inputs[3, :n] = pages.table.ctypes.data, pages.memory.ctypes.data
        m["n"], m["together"], m["all"], m["chunks"] = n, n > 1, False, 1
        m["logits"], m["logits_stride"], m["states"] = (
            self._logits.ctypes.data,
            4 * self._logits_width,
            states.ctypes.data,
        )
        self._team.step(first=self._draft_rows[0], end=self._draft_rows[1])
        self._check()

    def _check(self) -> None:
        """Raise GGUFError where a router of the last step gave no numbers, or an expert could not be read."""
        if self.residency is not None:
            self.residency.check()
        if self._trouble[0]:
            layer, self._trouble[0] = int(self._trouble[0]) - 1, 0
            raise GGUFError(
                f"{self.file.path}: the router of layer {layer} gives no numbers (NaN or infinite); the file's weights are damaged"
            )

    def _read(self, pages: Pages, start: int, tokens: np.ndarray, out: np.ndarray | None = None,
              states: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
        """Append tokens to a sequence that has `start`; float32 [vocab], a copy, or all rows into `out`."""
        with self._lock:
            done = 0
            while done < len(tokens):
                at = start + done
                piece = tokens[done : done + self._piece(at, len(tokens) - done)]
                pages.own(at)
                pages.reserve(at + len(piece))
                target = self._logits if out is None else out[done:]
                self._step(piece, np.arange(at, at + len(piece)), [pages], together=len(piece) > 1, logits=target,
                           is_all=out is not None, states=None if states is None else states[done:])  # fmt: skip
                done += len(piece)
                if self._has_state and (at + len(piece)) % PAGE == 0:
                    pages.snapshot(at + len(piece), is_lasting=len(piece) > 1)
            return self._logits[: self.vocab_size].copy()

    def _piece(self, at: int, left: int) -> int:
        """How many of the tokens that are left are read next: where the model has a recurrent state, so that a snapshot of it
        can be taken at whole multiples of a chunk, at the last full page, and at the last page that ends before the last token,
        from which the same prompt would go on."""
        if not self._has_state or left == 1:
            return min(left, self._chunk)
        end = at + left
        whole = at + self._chunk - at % self._chunk if self._chunk % PAGE == 0 else at + self._chunk
        stops = [whole, (end - 1) // PAGE * PAGE, end // PAGE * PAGE, end]
        return min(stop for stop in stops if stop > at) - at

    def _ids(self, tokens: Sequence[int]) -> np.ndarray:
        """int64 [n]. Raises ValueError for an empty sequence or an id outside of the vocabulary."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError("no tokens were given; at least one is needed")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens are integers, not {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"the token {worst} is outside of the vocabulary of {self.vocab_size}")
        return ids.astype(np.int64)

    def _room(self, used: int, more: int) -> None:
        if used + more > self.context:
            raise ContextFull(
                f"{used + more:,} tokens do not fit into a context of {self.context:,}; shorten the prompt or rewind the session"
            )

    # --- For users. ---

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab]: logits after every token of a fresh context. Raises ContextFull, ValueError."""
        ids = self._ids(tokens)
        self._room(0, len(ids))
        out = np.empty((len(ids) + self._tile, self._logits_width), np.float32)
        self._read(self._sequence(), 0, ids, out)
        return out[: len(ids), : self.vocab_size]

    def routes(self, n: int) -> np.ndarray:
        """int64 [layers with experts, n, used]: what experts the n tokens of the last step chose, best first.

        A step is one token, or one piece of a prompt.
        """
        return np.stack(
            [chosen.reshape(-1)[: n * chosen.shape[1]].reshape(n, -1)[:, :-1] for chosen in self._routes.values()]
        )

    def session(self) -> Session:
        """A fresh context of this model."""
        return Session(self)

    def generate_ids(self, tokens: Sequence[int], count: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """The likeliest token, `count` times, until one of `stop` (which is not yielded)."""
        feeder = self.feeder(self.session())
        logits = feeder.feed(tokens)
        for i in range(count):
            token = int(logits.argmax())
            if token in stop:
                return
            yield token
            if i + 1 < count:
                logits = feeder.feed([token])

    def feeder(self, session: Session) -> Session | Ahead:
        """What feeds a session, perhaps a token ahead: it has `feed`, and where it is no session itself, `finish`."""
        from organs.giant.speculate import Ahead

        return session if self._draft_rows is None else Ahead(session)

    def feed_all(self, sessions: Sequence[Session], tokens: Sequence[int]) -> np.ndarray:
        """float32 [sessions, vocab]: one more token for each of several sessions, in one step.

        The matrices are read once for all of them. Raises ContextFull, ValueError (also for a session that comes twice).
        """
        ids = self._ids(tokens)
        if len(sessions) != len(ids) or len(set(map(id, sessions))) != len(sessions):
            raise ValueError("every session takes exactly one token")
        for session in sessions:
            self._room(len(session.tokens), 1)
            if session._is_torn:
                session._mend()
        if len(sessions) == 1:
            return sessions[0].feed(tokens)[None]
        out = np.empty((len(ids) + self._tile, self._logits_width), np.float32)
        with self._lock:
            for first in range(0, len(ids), self._chunk):
                some = sessions[first : first + self._chunk]
                for session in some:
                    session._pages.own(len(session.tokens))
                    session._pages.reserve(len(session.tokens) + 1)
                positions = np.array([len(session.tokens) for session in some])
                sequences = [session._pages for session in some]
                try:
                    self._step(ids[first : first + len(some)], positions, sequences, together=False, logits=out[first:],
                               is_all=True)  # fmt: skip
                except BaseException:
                    for session in sessions:
                        session._is_torn = True
                    raise
        for session, token in zip(sessions, ids.tolist(), strict=True):
            if self._has_state and (len(session.tokens) + 1) % PAGE == 0:
                session._pages.snapshot(len(session.tokens) + 1, is_lasting=False)
            session._joined([token])
        return out[: len(ids), : self.vocab_size]

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [width]: the mean of the last layer's normed states over the tokens, of length 1."""
        ids = self._ids(tokens)
        self._room(0, len(ids))
        states = np.empty((len(ids), self.shape.width), np.float32)
        self._read(self._sequence(), 0, ids, states=states)
        mean = states.mean(0)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)

    def close(self) -> None:
        """Send the threads home and close the file."""
        self._team.close()
        if self.residency is not None:
            self.residency.close()
        if self._runner is not None:
            self._runner.close()
        self.file.close()

    def __del__(self) -> None:
        if hasattr(self, "_team") and not sys.is_finalizing():
            self._team.close()


class Session:
    """One context: the tokens that were fed, and their keys and values."""

    def __init__(self, giant: Giant):
        self.giant, self.tokens = giant, []
        self._pages = giant._sequence()
        self._is_torn = False  # whether the last step failed
        self.read_from = 0  # the position where the last reading began: what is before it was known

    giant: Giant
    tokens: list[int]

    def feed(self, tokens: Sequence[int], states: np.ndarray | None = None) -> np.ndarray:
        """float32 [vocab], a copy: logits after the last of these tokens (at least one), which join the context.

        states: float32 [tokens, width], where the last layer's normed states go, of those that were read (`read_from` on).
        A beginning that an earlier session fed is taken from the prefix cache. Raises ContextFull (and changes nothing) where
        they do not fit, ValueError for an id outside of the vocabulary.
        """
        giant = self.giant
        ids = giant._ids(tokens)
        giant._room(len(self.tokens), len(ids))
        start, skipped = len(self.tokens), 0
        if self._is_torn:
            self._mend()
        try:
            if start == 0 and len(ids) > PAGE:
                skipped = self._begin(ids[:-1])
            self.read_from = start + skipped
            rest = None if states is None else states[skipped:]
            logits = giant._read(self._pages, start + skipped, ids[skipped:], states=rest)
        except BaseException:
            self._is_torn = True
            raise
        self._joined(ids.tolist())
        return logits

    def _mend(self) -> None:
        """After a step that failed: keys that it wrote are written over, but a recurrent state has gone on and must come back."""
        self._is_torn = False
        if self.giant._memory_bytes:  # staged keys of 4 bits may belong to a later page by now
            self._restore(np.array(self.tokens, np.int64))

    def _begin(self, ids: np.ndarray) -> int:
        """Take what is known of a beginning from the prefix cache; how many tokens that is."""
        found, memory = self.giant.prefixes.resume(ids.tolist())
        self._pages.adopt(found, memory)
        return len(found) * PAGE

    def _joined(self, ids: list[int]) -> None:
        before = len(self.tokens) // PAGE
        self.tokens += ids
        if len(self.tokens) // PAGE > before:
            kept = self.giant.prefixes.keep(self.tokens, self._pages.pages, self._pages.take_snapshots())
            self._pages.shared = max(self._pages.shared, kept)

    def rewind(self, n: int) -> None:
        """Keep the first n tokens only. Raises ValueError unless 0 <= n <= len(tokens).

        A recurrent state cannot be undone: it comes back from the nearest snapshot before, and tokens since then are read again.
        """
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"a session of {len(self.tokens)} tokens cannot be rewound to {n}")
        if self.giant._memory_bytes and 0 < n < len(self.tokens):
            self._restore(np.array(self.tokens[:n]))
        elif n < len(self.tokens):
            self._pages.truncate(n)
        del self.tokens[n:]

    def _restore(self, ids: np.ndarray) -> None:
        """Have pages and state as they were behind these tokens, which begin those that were fed."""
        full = self._pages.pages[: len(ids) // PAGE]
        self._pages = self.giant._sequence()
        if self.giant._has_state:
            begin = self._begin(ids)
        else:  # only keys of the last page are gone
            self._pages.adopt(full)
            begin = len(full) * PAGE
        if begin < len(ids):
            self.giant._read(self._pages, begin, ids[begin:])

    def fork(self) -> Session:
        """A second session with the same context; what they share is held once."""
        if self._is_torn:
            self._mend()
        other = Session(self.giant)
        other.tokens, other._pages = list(self.tokens), self._pages.fork()
        return other

    def close(self) -> None:
        """Give the memory back; the prefix cache may keep what it likes."""
        self.rewind(0)


def free_memory() -> int:
    """Bytes that programs can still have (Linux; elsewhere 8 GB are assumed)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30


def default_threads() -> int:
    """The CPUs that this process may use, at most eight."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _has_kernels() -> bool:
    """Whether compiled code of the giant, as it is now, is in the cache (perhaps not of all formats)."""
    from organs.giant import lanes

    return any(kernels.folder_of("giant", lanes.SOURCES).glob("*.attention.o"))
