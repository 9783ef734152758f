"""The ensemble: next-byte distributions of several organisms, mixed with weights that are learned from byte to byte.

    p(b) ∝ Π pᵢ(b)^wᵢ        wᵢ += rate · (ln pᵢ(x) − Σ_b p(b) ln pᵢ(b))        after byte x

which is the gradient of ln p(x): a product of experts, in which several that agree are surer than each of them. Beside it
stands the Bayesian mixture Σ vᵢ pᵢ, whose vᵢ are the shares of those that have predicted well so far, a little of which is given
back to all (fixed share), and which finds a lone specialist within a few bytes. It is one more expert of the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RATE = 0.001  # of the product's weights (a passage of each of four domains: 0.02 cost 2.4 %, 0.005 a half, this gained in all)
SHARED = 0.0005  # of the shares of the mixture, given back to all after each byte: it costs as many nats a byte, and log(n) once
LEAST = 1e-12  # probability


class Mixer:
    """Of `count` organisms. `mix` takes float64 [count, S] and returns float64 [S]; `learn` tells it which symbol came."""

    def __init__(self, count: int, rate: float = RATE, shared: float = SHARED):
        self.rate, self.shared = rate, shared
        self.shares = np.full(count, 1 / count)  # of the mixture
        self.weights = np.append(np.zeros(count), 1.0)  # of the product: it begins as the mixture
        self._seen: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def leave(self, gone: int) -> None:
        """One of them is no longer there."""
        self.shares = np.delete(self.shares, gone)
        self.shares /= self.shares.sum()
        self.weights, self._seen = np.delete(self.weights, gone), None

    def mix(self, given: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        p = np.maximum(np.asarray(given, np.float64), LEAST)
        logs = np.log(np.vstack([p, self.shares @ p]))
        mixed = self.weights @ logs
        mixed = np.exp(mixed - mixed.max())
        mixed /= mixed.sum()
        self._seen = p, logs, mixed
        return mixed

    def learn(self, symbol: int) -> float:
        """Bits that the symbol cost; the next `mix` knows about it."""
        assert self._seen is not None, "mix comes first"
        p, logs, mixed = self._seen
        self.weights += self.rate * (logs[:, symbol] - logs @ mixed)
        self.shares *= p[:, symbol]
        self.shares = (1 - self.shared) * self.shares / self.shares.sum() + self.shared / len(self.shares)
        self._seen = None
        return -math.log2(mixed[symbol])
