"""The body's graph in PyTorch: another engine of training (`--engine torch`), on a GPU where there is one.

Same parameters by the same names, same losses, same AdamW as chapters 2 and 5 of organism.py; only the gradients come
from PyTorch. On the CPU the engine works on the body's arena itself. On an accelerator it works on a copy, and `sync`
brings the arena up to date, at no cost where nothing has changed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from organism import FROZEN, Arena, Body, BodyShape, FieldView, LearningConfig, UsageError, log, rope_angles

MICRO_FLOPS = 5e9  # of a micro-batch on a CPU, some 50 ms: training can pause that soon for a reply
MICRO_BYTES = 2e9  # of the activations of a micro-batch, about


def choose_device() -> torch.device:
    """CUDA, then MPS, then the CPU; ORGANISM_TORCH_DEVICE ("cpu", "cuda:1", …) outranks that."""
    wish = os.environ.get("ORGANISM_TORCH_DEVICE")
    if not wish:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(wish)
        torch.zeros(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: it depends on the device
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        raise UsageError(f"ORGANISM_TORCH_DEVICE={wish} cannot be used: {reason}.") from error
    return device


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Denormals count as zero inside: with them, learning what is known by heart would be many times slower. The switch
    belongs to a thread, and the threads that PyTorch starts inherit it."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# --- The graph, which mirrors organism.record_hidden. P: parameters by name; x [B, T, C]. ---


def _rotate(z: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on z [B, H, T, D]: interleaved pairs, turned by their position."""
    even, odd = z[..., 0::2], z[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _project(x: torch.Tensor, shape: BodyShape, P: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """x @ weight and what each delta adds, as organism.project."""
    out = x @ P[name]
    for k, (parts, rank, _) in enumerate(shape.deltas):
        delta = f"{shape.delta_name(k)}.{name}"
        low, z = (x @ P[f"{delta}.a"]).split([parts * rank, parts], -1)
        gate = P[f"{FROZEN}{k}.strength"] * torch.sigmoid(z + P[f"{delta}.bias"])
        out = out + (low.unflatten(-1, (parts, rank)) * gate.unsqueeze(-1)).flatten(-2) @ P[f"{delta}.b"]
    return out


def _attend(
    h: torch.Tensor, shape: BodyShape, P: dict[str, torch.Tensor], block: str, angles: torch.Tensor
) -> torch.Tensor:
    """Causal attention of content, hybrid and pure heads, in this order; qkv holds their patterns as well."""
    (B, T, _), H, D, patterned = h.shape, shape.heads, shape.head_size, shape.hybrid + shape.pure
    product = _project(h, shape, P, f"{block}.qkv")
    q, k, v = product[..., : 3 * H * D].view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    q, k = (_rotate(z, *angles[:, :T]).to(v.dtype) for z in (q, k))
    if not patterned:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    pattern = product[..., 3 * H * D :].view(B, T, patterned, shape.context)[..., :T].transpose(1, 2)
    content = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    plain, mixed = H - patterned, H - shape.pure
    parts = [content[:, :plain]]
    if shape.hybrid:
        gate = torch.sigmoid(P[f"{block}.alpha"])[:, None, None]
        parts.append((1 - gate) * content[:, plain:mixed] + gate * pattern[:, : shape.hybrid])
    parts.append(pattern[:, shape.hybrid :])
    future = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
    p = torch.cat(parts, 1).masked_fill(future, -math.inf).softmax(-1)
    return (p.to(v.dtype) @ v).transpose(1, 2).flatten(2)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {"attention": _attend}  # as organism.SEQUENCE_OPERATORS


def _norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(x, gain.shape, gain, epsilon)


def _expected(view: FieldView, P: dict[str, torch.Tensor], scalars: torch.Tensor) -> torch.Tensor:
    """[N, C]: what the field expects next, Σ p · expected[token] over its single tokens, and its scalars."""
    tokens, p = (torch.from_numpy(a).to(scalars.device) for a in view.singletons())
    dense = scalars.new_zeros(len(tokens), len(P["expected"])).scatter_add_(1, tokens.long(), p.to(scalars.dtype))
    return dense @ P["expected"] + scalars @ P["scalars"]


def hidden(
    shape: BodyShape, P: dict[str, torch.Tensor], tokens: torch.Tensor, view: FieldView | None, angles: torch.Tensor
) -> torch.Tensor:
    """Embedding, blocks, last norm: [B, T, C] of tokens [B, T]; tokens below 0 are left out."""
    x = P["embedding"][tokens.clamp(min=0)] * (tokens >= 0).unsqueeze(-1)
    if shape.on_field:
        assert view is not None, "a body on the field is shown the field's view"
        x = x + _expected(view, P, _scalars(view, x)).view_as(x)
    scale, epsilon = 1 / math.sqrt(shape.layers), shape.epsilon
    for n, operator in enumerate(shape.operators):
        block = f"blocks.{n}"
        mixed = OPERATORS[operator](_norm(x, P[f"{block}.norm1"], epsilon), shape, P, block, angles)
        x = x + scale * _project(mixed, shape, P, f"{block}.out")
        gate, up = _project(_norm(x, P[f"{block}.norm2"], epsilon), shape, P, f"{block}.gate_up").chunk(2, -1)
        x = x + scale * _project(F.silu(gate) * up, shape, P, f"{block}.down")
    return _norm(x, P["norm"], epsilon)


def _scalars(view: FieldView, like: torch.Tensor) -> torch.Tensor:
    """The six numbers beside each row of a view, [N, 6]."""
    return torch.from_numpy(view.scalars.astype(np.float32)).to(like)


def logits(shape: BodyShape, P: dict[str, torch.Tensor], h: torch.Tensor, view: FieldView | None) -> torch.Tensor:
    """[B·T, V]: the tied head, or head and gain · ln p of the field."""
    h = h.flatten(0, 1)
    if not shape.on_field:
        return h @ P["embedding"].T
    assert view is not None, "a body on the field is shown the field's view"
    made_of = torch.cat([h, _scalars(view, h), h.new_ones(len(h), 1)], 1)
    log_field = torch.from_numpy(view.dense_log()).to(h)
    return h @ P["head"].T + (made_of @ P["gain"])[:, None] * log_field


# --- The engine. ---


class Gradients:
    """Trains a body: gradients by autograd, then AdamW over flat arrays as organism.adamw has it."""

    def __init__(self, body: Body, config: LearningConfig, threads: int | None = None):
        self.body, self.config, self.yield_flag = body, config, np.zeros(1, np.int64)
        self.device, self.ahead = choose_device(), False
        if threads:
            torch.set_num_threads(threads)
        arena, shape = body.arena, body.shape
        self.arrays = {name: torch.from_numpy(getattr(arena, name)).to(self.device) for name in Arena.ARRAYS}
        self.gradient = torch.zeros_like(self.arrays["parameters"][: arena.trained])
        # Leaves are views into the flat parameters, and their gradients are views into the flat gradient: autograd adds
        # to a gradient that is there. Place.of slices tensors as well as arrays.
        flat: Any = self.arrays["parameters"]
        self.parameters: dict[str, torch.Tensor] = {
            name: place.of(flat).detach().requires_grad_(place.trained) for name, place in arena.places.items()
        }
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.grad = arena.places[name].of(self.gradient)
        self.angles = torch.from_numpy(rope_angles(shape.context, *shape.rope)).to(self.arrays["parameters"])
        log.info("training with PyTorch %s on %s in %s", torch.__version__, self.device, config.precision)

    def _micro(self, B: int, T: int) -> int:
        """Sequences of a micro-batch: bounded by memory, and on a CPU by how long a reply may wait."""
        shape, flops = self.body.shape, 6 * T * len(self.body.arena)
        bytes = 4 * T * (6 * shape.vocabulary + shape.layers * (40 * shape.width + 4 * shape.heads * T))
        most = MICRO_BYTES / bytes if self.device.type != "cpu" else min(MICRO_BYTES / bytes, MICRO_FLOPS / flops)
        parts = -(-B // max(1, int(most)))  # of about equal size
        return -(-B // parts)

    def _loss(self, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> torch.Tensor:
        """Summed loss in nats of a micro-batch."""
        tokens, targets = (torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(self.device) for a in (x, y))
        shape, P = self.body.shape, self.parameters
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = logits(shape, P, hidden(shape, P, tokens, view, self.angles), view)
        wide = out if out.dtype == torch.float64 else out.float()
        return F.cross_entropy(wide, targets.flatten(), reduction="sum")

    def _accumulate(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, targets: int) -> float:
        """Fill `gradient` with that of the loss summed over all targets and divided by `targets`; returns that loss."""
        (B, T), total = x.shape, 0.0
        self.gradient.zero_()
        micro = self._micro(max(1, B), T)
        for b in range(0, B, micro):
            while self.yield_flag[0]:
                time.sleep(0.001)
            rows = slice(b, b + micro)
            loss = self._loss(x[rows], y[rows], None if view is None else view[b * T : (b + micro) * T]) / targets
            loss.backward()
            total += float(loss.detach())
        return total

    def of(self, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss in nats, and its gradients by the names of the parameters."""
        with _flushed():
            loss = self._accumulate(x, y, view, x.size)
        trained = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.requires_grad}
        return loss, {name: grad.cpu().numpy().copy() for name, grad in trained.items()}

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int, targets: int = 0,
             add_up: Callable[[torch.Tensor], object] | None = None) -> float:  # fmt: skip
        """One step of AdamW on tokens x, targets y [B, T]; returns the mean loss in nats. Of one worker among several, the
        batch is a part of one with so many targets, and so is its loss; add_up sums their gradients, in place."""
        with _flushed():
            loss = self._accumulate(x, y, view, targets or x.size)
            if add_up is not None:
                add_up(self.gradient)
            self._adamw(rate, step)
        self.ahead = self.device.type != "cpu"
        return loss

    @torch.no_grad()
    def _adamw(self, rate: float, step: int) -> None:
        """organism.adamw, in place on tensors; `step` counts from 1."""
        c, g, decayed = self.config, self.gradient, self.body.arena.decayed
        p, mean, square, average = (self.arrays[name][: self.body.arena.trained] for name in Arena.ARRAYS)
        if c.max_grad_norm > 0:  # the norm stays on the device: an accelerator need not wait for it
            wide = None if self.device.type == "mps" else torch.float64  # MPS has no float64
            norm = torch.linalg.vector_norm(g, dtype=wide)
            g.mul_((c.max_grad_norm / (norm + 1e-6)).clamp(max=1).to(g.dtype))
        mean.lerp_(g, 1 - c.beta1)
        square.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        root = (square / (1 - c.beta2**step)).sqrt_().add_(c.epsilon)
        p[:decayed].mul_(1 - rate * c.weight_decay)
        p.addcdiv_(mean, root, value=-rate / (1 - c.beta1**step))
        average.lerp_(p, max(1 - c.average, 1 / (step + 1)))

    def sync(self) -> None:
        """Bring the body's arena up to date; on the CPU it always is."""
        if not self.ahead:
            return
        for name, array in self.arrays.items():
            getattr(self.body.arena, name)[:] = array.cpu().numpy()
        self.ahead = False

    def close(self) -> None:
        """Write back what was learned, and let go of the tensors."""
        self.sync()
        self.arrays, self.parameters, self.gradient = {}, {}, torch.zeros(0)
