"""An accelerator (CUDA, Metal) by torch: what lies there, what a sequence has there, and how what does not fit comes and goes.

Tensors stay in the accelerator's memory as the file has them and become float32 where they are used, a slab at a time: a product
reads its quantised bytes, writes SLAB bytes of numbers at most, and multiplies. That costs time (docs/giant.md says how much)
and no memory that grows with the model. What layers compute is organs/giant/torch_layers.py's, which of them are here
organs/giant/placing.py's.

"torch" as a device is torch's own CPU: the same code where there is no accelerator, for tests.
"""

from __future__ import annotations

import platform
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from organs.giant.cache import PAGE, Page, Pages
from organs.giant.gguf import GGUFError, GGUFFile, TensorInfo

if TYPE_CHECKING:
    import torch

OFFLOADS = ("none", "up", "updown", "experts", "disk", "auto")
STREAMED = dict(up=("up",), updown=("up", "down"))  # experts' matrices that are copied when they are wanted
DEVICES = ("auto", "cpu", "cuda", "mps", "torch")
SLAB = 64 << 20  # bytes of float32 that a product may have at a time
WORKSPACE = 512 << 20  # bytes that are left free for slabs and activations
GUESSES = 2  # requests for which an expert that was guessed is not given up


class AcceleratorFull(MemoryError):
    """The accelerator has no memory left. The turn is over, and what was in the context before it is still there."""


def device_of(name: str) -> str:
    """The kind of device that a name means: "cpu" (no accelerator), "cuda", "mps" or "torch".

    auto: CUDA, then Metal, then the CPU; torch is imported only where a driver of an accelerator is seen, since that takes a
    second. Raises ValueError for a device that this machine lacks.
    """
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}; it can be {', '.join(DEVICES[:4])}")
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return "cpu"
    try:
        import torch
    except ImportError as error:
        if name == "auto":
            return "cpu"
        raise ValueError(f"device {name} needs PyTorch: pip install -e '.[torch]'") from error
    found = dict(cuda=torch.cuda.is_available, mps=torch.backends.mps.is_available, torch=lambda: True)
    if name == "auto":
        return next((kind for kind in ("cuda", "mps") if found[kind]()), "cpu")
    if not found[name]():
        raise ValueError(f"there is no {name} device that torch {torch.__version__} can use here")
    return name


def layers_of(offload: str) -> int | None:
    """N of "layers=N", None for another way. Raises ValueError for what is neither."""
    found = re.fullmatch(r"layers=(\d+)", offload)
    if not found and offload not in OFFLOADS:
        raise ValueError(f"offload is {offload!r}; it can be {', '.join(OFFLOADS)} or layers=N")
    return int(found.group(1)) if found else None


def _has_driver() -> bool:
    is_mac = sys.platform == "darwin" and platform.machine() == "arm64"
    return is_mac or any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


@dataclass
class Traffic:
    """What moved between the machine's memory and the accelerator's since the model was loaded."""

    up: int = 0  # bytes of activations to the accelerator
    down: int = 0  # bytes from it
    wanted: int = 0  # experts that were wanted whose matrices live in the machine's memory
    hits: int = 0  # of them, on the accelerator when they were wanted
    guessed: int = 0  # experts of a next layer that were guessed, where it could be seen what came
    right: int = 0  # of them, those that were wanted
    bytes: int = 0  # of experts that were copied
    copying: float = 0.0  # seconds in which experts were copied
    stall: float = 0.0  # seconds in which computing waited for that


class Accelerator:
    """A device, its memory, and the counters of what moves. `budget`: bytes that it may be made to hold; None: what is free.

    On torch's CPU, where nothing else would hold it back, the budget is what keeps the rule.
    """

    def __init__(self, kind: str, budget: int | None = None):
        import torch

        self.kind, self.device = kind, torch.device("cpu" if kind == "torch" else kind)
        self.budget = self.free() if budget is None else budget
        self.weights = 0  # bytes of tensors
        self.sequences: weakref.WeakSet[DevicePages] = weakref.WeakSet()
        self.traffic = Traffic()

    def free(self) -> int:
        """Bytes that programs can still have of the device's memory."""
        import torch

        if self.kind == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.kind == "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        from organs.giant.giant import free_memory

        return free_memory()

    @property
    def held(self) -> int:
        """Bytes of weights and of all sequences' keys, values and states."""
        return self.weights + sum(sequence.held for sequence in self.sequences)

    def room(self, nbytes: int, what: str) -> None:
        """Raise AcceleratorFull unless so many bytes more are within the budget."""
        if self.held + nbytes > self.budget:
            raise AcceleratorFull(
                f"the accelerator's {self.budget / 1e9:.2f} GB are full: {self.held / 1e9:.2f} GB are used, and {what} "
                f"would take {nbytes / 1e6:.1f} MB more"
            )

    def place(self, array: np.ndarray, what: str) -> torch.Tensor:
        """An array in the device's memory. Raises AcceleratorFull."""
        import torch

        self.room(array.nbytes, what)
        self.weights += array.nbytes
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def bytes_of(self, file: GGUFFile, info: TensorInfo, order: np.ndarray | None = None) -> torch.Tensor:
        """uint8 [rows, bytes] of a tensor as the file has it, of experts [experts, rows, bytes]; order: which rows, in what order.

        Raises AcceleratorFull, GGUFError.
        """
        raw = raw_rows(file, info)
        return self.place(raw if order is None else raw[order], info.name)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """Activations on their way to the device."""
        import torch

        self.traffic.up += array.nbytes
        return torch.from_numpy(array).to(self.device)

    def download(self, tensor: torch.Tensor) -> np.ndarray:
        """Activations on their way back; waits for what computes them."""
        self.traffic.down += tensor.nbytes
        return tensor.cpu().numpy()

    def report(self) -> dict[str, Any]:
        """The counters, with their rates."""
        t = self.traffic
        hidden = max(0.0, 1 - t.stall / t.copying) if t.copying else 1.0
        return asdict(t) | dict(device=self.kind, held=self.held, hit_rate=t.hits / max(1, t.wanted), hidden=hidden)


def raw_rows(file: GGUFFile, info: TensorInfo) -> np.ndarray:
    """uint8: a tensor's bytes, [..., rows, bytes of a row]. Raises GGUFError where it cannot be read."""
    raw = np.empty(info.nbytes, np.uint8)
    file.read(info, raw)
    return raw.reshape(*info.shape[:-1], -1)


# --- What a sequence has there. ---


class DevicePages(Pages):
    """A sequence whose layers are on the accelerator, all or some: their keys and values lie there from position 0 on.

    Pages, which are shared, kept and saved, are the machine's: a page that is full is copied to it once, and one that was
    adopted is copied back before it is read. A recurrent state is copied when a snapshot is taken.
    """

    def __init__(self, page_bytes: int, memory_bytes: int, accelerator: Accelerator, layers: Sequence[Any]):
        super().__init__(page_bytes, memory_bytes)
        self.accelerator, self.layers = accelerator, layers
        self.planes: dict[Any, list[torch.Tensor]] = {}  # of a layer's keys and values: [heads, room, …]
        self.states: dict[Any, tuple[torch.Tensor, ...]] = {}  # of recurrent layers
        self.valid = 0  # positions that the accelerator has
        accelerator.sequences.add(self)

    @property
    def held(self) -> int:
        tensors = [*self.planes.values(), *self.states.values()]
        return sum(t.nbytes for some in tensors for t in some)

    def ready(self, start: int, end: int) -> None:
        """Have all positions before `start` there, and room up to `end`. Raises AcceleratorFull."""
        for layer in self.layers:
            layer.make_room(self, end)
            for first in range(self.valid - self.valid % PAGE, start, PAGE) if self.valid < start else ():
                layer.load(self, self.pages[first // PAGE], first)
            if layer not in self.states:
                layer.load_state(self)
        self.valid = start

    def written(self, end: int) -> None:
        """Positions up to `end` are there now: copy the pages that became full to the machine's memory."""
        for page in range(self.valid // PAGE, end // PAGE):
            self._fetch(page)
        self.valid = end

    def _fetch(self, page: int) -> None:
        for layer in self.layers:
            layer.save(self, self.pages[page], page * PAGE)

    def snapshot(self, position: int, is_lasting: bool) -> None:
        self._settle()
        super().snapshot(position, is_lasting)

    def _settle(self) -> None:
        """Have in the machine's memory what the accelerator has: states, and the page that is being written."""
        for layer in self.layers:
            layer.save_state(self)
        if self.valid % PAGE:
            self._fetch(self.valid // PAGE)

    def adopt(self, pages: Sequence[Page], memory: np.ndarray | None = None) -> None:
        super().adopt(pages, memory)
        self.valid, self.states = 0, {}

    def fork(self) -> Pages:
        self._settle()
        other = DevicePages(self.page_bytes, len(self.memory), self.accelerator, self.layers)
        other.adopt(self.pages, self.memory)
        self.shared = len(self.pages)
        return other

    def truncate(self, positions: int) -> None:
        super().truncate(positions)
        self.valid = min(self.valid, positions)
        if positions == 0:
            self.planes, self.states = {}, {}


# --- Experts that live in the machine's memory and are copied when they are wanted. ---


class Slots:
    """Copies of experts' matrices on the accelerator, those that were used last; others are copied by a thread of its own.

    An expert's matrices of a layer, one after the other, are a row of that layer's host tensor, uint8 [experts, bytes].
    """

    def __init__(self, accelerator: Accelerator, is_prefetching: bool = True):
        self.accelerator, self.is_prefetching = accelerator, is_prefetching
        self.hosts: dict[int, torch.Tensor] = {}
        self.slot_of: OrderedDict[tuple[int, int], int] = OrderedDict()  # the longest unused first
        self.coming: dict[tuple[int, int], Future] = {}
        self.guesses: dict[tuple[int, int], int] = {}  # by which request
        self.last_guess: tuple[int, set[int]] = (-1, set())
        self.now = 0
        self.pool: torch.Tensor | None = None
        self.worker = ThreadPoolExecutor(1, "giant-copier")
        self.lock = threading.Lock()  # of the counters that the worker changes

    def add(self, layer: int, host: torch.Tensor) -> None:
        """Enter a layer's experts; on CUDA they are pinned, so that copies run beside computing."""
        self.hosts[layer] = host.pin_memory() if self.accelerator.kind == "cuda" else host

    def start(self, least: int) -> None:
        """Make the pool out of what is left of the budget. Raises AcceleratorFull where it holds fewer than `least` experts."""
        import torch

        size = max(host.shape[1] for host in self.hosts.values())
        every = sum(len(host) for host in self.hosts.values())
        left = self.accelerator.budget - self.accelerator.held - WORKSPACE
        count = min(every, max(least, left // size))
        self.accelerator.room(count * size, f"room for {count} experts")
        self.accelerator.weights += count * size
        self.pool = torch.empty(count, size, dtype=torch.uint8, device=self.accelerator.device)
        self.free = list(range(count - 1, -1, -1))
        if self.accelerator.kind == "cuda":
            self.taken = torch.cuda.Event()

    @property
    def count(self) -> int:
        """How many experts have room."""
        assert self.pool is not None
        return len(self.pool)

    def take(self, layer: int, experts: Sequence[int]) -> torch.Tensor:
        """uint8 [experts, bytes]: these experts of a layer, at most `count`, copied first if need be. Raises what copying ended with."""
        import torch

        assert self.pool is not None and len(experts) <= self.count
        self.now += 1
        keys = [(layer, int(expert)) for expert in experts]
        traffic, began = self.accelerator.traffic, time.perf_counter()
        traffic.wanted += len(keys)
        traffic.hits += sum(key in self.slot_of and self._is_here(key) for key in keys)
        for key in keys:
            self.guesses.pop(key, None)
            if key in self.slot_of:
                self.slot_of.move_to_end(key)
        for key in keys:
            self._fetch(key, set(keys))
        for key in keys:
            self._await(key)
        traffic.stall += time.perf_counter() - began
        taken = self.pool[torch.tensor([self.slot_of[key] for key in keys], device=self.accelerator.device)]
        if self.accelerator.kind == "cuda":
            self.taken.record()
        return taken

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to copy what the next layer will probably want."""
        if not self.is_prefetching or layer not in self.hosts:
            return
        self.last_guess = layer, set(experts)
        for expert in experts:
            if not self._fetch((layer, int(expert)), set(), is_guess=True):
                return

    def judge(self, layer: int, wanted: set[int]) -> None:
        """Count what came of the last guess."""
        following, guess = self.last_guess
        if following == layer:
            self.accelerator.traffic.guessed += len(guess)
            self.accelerator.traffic.right += len(guess & wanted)
        self.last_guess = -1, set()

    def _is_here(self, key: tuple[int, int]) -> bool:
        return key not in self.coming or self.coming[key].done()

    def _await(self, key: tuple[int, int]) -> None:
        coming = self.coming.pop(key, None)
        if coming is not None:
            try:
                coming.result()
            except Exception as error:
                self.coming[key] = coming
                self._drop_failed()
                raise GGUFError(
                    f"expert {key[1]} of layer {key[0]} cannot be copied to the accelerator: {error}"
                ) from error

    def _drop_failed(self) -> None:
        """Let what is under way end; what failed is not there, and will be copied anew when it is wanted."""
        for key, coming in list(self.coming.items()):
            if coming.exception() is not None:
                del self.coming[key]
                self.guesses.pop(key, None)
                self.free.append(self.slot_of.pop(key))

    def _fetch(self, key: tuple[int, int], wanted: set[tuple[int, int]], is_guess: bool = False) -> bool:
        """Begin to copy an expert that is not there. False: a guess found no room."""
        if key in self.slot_of:
            return True
        slot = self.free.pop() if self.free else self._evict(wanted, is_guess)
        if slot is None:
            return False
        self.slot_of[key] = slot
        if is_guess:
            self.guesses[key] = self.now
        self.coming[key] = self.worker.submit(self._copy, key, slot)
        return True

    def _evict(self, wanted: set[tuple[int, int]], is_guess: bool) -> int | None:
        """The slot of the expert that was not used for longest. Nothing that is wanted now, or that a guess must not push out."""
        for key in self.slot_of:
            is_fresh = self.now - self.guesses.get(key, -GUESSES) < GUESSES
            if key not in wanted and self._is_here(key) and not is_fresh:
                return self._give_up(key)
        if is_guess:
            return None
        for key in self.slot_of:  # what was guessed a moment ago goes only for what is wanted
            if key not in wanted:
                return self._give_up(key)
        raise AssertionError("more experts are wanted than there are slots")

    def _give_up(self, key: tuple[int, int]) -> int:
        coming = self.coming.pop(key, None)
        if coming is not None and not coming.cancel():
            coming.exception()  # its copy must not come after the next one's
        self.guesses.pop(key, None)
        return self.slot_of.pop(key)

    def _copy(self, key: tuple[int, int], slot: int) -> None:
        import torch

        assert self.pool is not None
        began, source = time.perf_counter(), self.hosts[key[0]][key[1]]
        target = self.pool[slot, : len(source)]
        if self.accelerator.kind == "cuda":
            stream = torch.cuda.Stream(self.accelerator.device)
            stream.wait_event(self.taken)  # the slot's last expert may still be read
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            stream.synchronize()
        else:
            target.copy_(source)
        with self.lock:
            self.accelerator.traffic.bytes += len(source)
            self.accelerator.traffic.copying += time.perf_counter() - began

    def close(self) -> None:
        """Send the worker home."""
        self.worker.shutdown(cancel_futures=True)


# --- How fast the device is: for `auto` and `giant plan`. ---


@dataclass(frozen=True)
class Speeds:
    """Of a device, measured here."""

    weights: float  # bytes of quantised matrices a second that products of one token take, dequantising included
    link: float  # bytes a second from the machine's memory to the device's
    free: int  # bytes of memory


def measure(accelerator: Accelerator, format: str, rows: int = 4096, columns: int = 2048) -> Speeds:
    """Multiply and copy for a moment."""
    import torch

    from organs.giant.formats import FORMATS
    from organs.giant.torch_layers import Weight

    form = FORMATS[format]
    columns = -(-columns // form.block) * form.block
    raw = torch.zeros(rows, columns // form.block * form.nbytes, dtype=torch.uint8)
    weight, x = Weight(raw.to(accelerator.device), format), torch.ones(1, columns, device=accelerator.device)
    pool = torch.empty_like(weight.raw)
    return Speeds(
        raw.nbytes / _seconds(accelerator, lambda: weight.times(x)),
        raw.nbytes / _seconds(accelerator, lambda: pool.copy_(raw)), accelerator.free(),
    )  # fmt: skip


def _seconds(accelerator: Accelerator, act: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest of some rounds, after one that warms up."""
    import torch

    wait = dict(cuda=torch.cuda.synchronize, mps=torch.mps.synchronize).get(accelerator.kind, lambda: None)
    best = float("inf")
    for _ in range(rounds + 1):
        began = time.perf_counter()
        act()
        wait()
        best = min(best, time.perf_counter() - began)
    return best
