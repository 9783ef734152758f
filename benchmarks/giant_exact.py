"""How exact the giant is: against llama.cpp's log-probabilities (the golden file), and against plain float64 arithmetic.

Usage: python benchmarks/giant_exact.py [MODEL.gguf] [--golden FILE]
MODEL is SmolLM2-135M-Instruct Q4_1 (`organism giant pull smollm2`), with which llama.cpp made the golden file
tests/golden/smollm2.json: the 16 likeliest tokens and their log-probabilities at every position of three prompts. llama.cpp
rounds activations to 8 bits and is itself 0.105 away from exact arithmetic here; so is a prompt that is read fast.
The plain pass is that of tests/giant/test_engine.py: dequantised weights, NumPy, float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from common import ROOT, table

from organs.giant import Giant, pull
from tests.giant.test_engine import apart, forward


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


class Against:
    """Agreement with a reference: top-1, mean |Δ log p| of the 16 likeliest tokens, negative log-likelihood of the text."""

    def __init__(self) -> None:
        self.agree: list[bool] = []
        self.differences: list[float] = []
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def add(self, ours: np.ndarray, tops: list[dict[int, float]], ids: list[int]) -> None:
        """ours: log-probabilities [n, vocab]; tops: of each position, log-probabilities of the reference's likeliest."""
        for i, top in enumerate(tops):
            self.agree.append(int(ours[i].argmax()) == max(top, key=lambda token: top[token]))
            self.differences += [abs(ours[i, token] - value) for token, value in top.items()]
            if i + 1 < len(ids) and ids[i + 1] in top:
                self.ours.append(-ours[i, ids[i + 1]])
                self.theirs.append(-top[ids[i + 1]])

    def row(self, name: str, must: str) -> list[object]:
        likelihood = np.mean(self.ours) / np.mean(self.theirs) - 1
        agree = f"{sum(self.agree)} of {len(self.agree)} ({np.mean(self.agree):.1%})"
        return [
            name,
            agree,
            f"{np.mean(self.differences):.4f}",
            f"{max(self.differences):.2f}",
            f"{likelihood:+.2%}",
            must,
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="a GGUF file, or the name of one that was pulled")
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden" / "smollm2.json")
    arguments = parser.parse_args()
    path = pull.find(arguments.model)
    prompts = json.loads(arguments.golden.read_text(encoding="utf-8"))["prompts"]
    golden = [[{int(t): p for t, p in position["top"]} for position in prompt["positions"]] for prompt in prompts]
    plain = [log_softmax(forward(path, prompt["ids"])) for prompt in prompts]
    exact = [[{int(t): row[t] for t in np.argsort(row)[-16:]} for row in rows] for rows in plain]
    fast, slow = Giant.load(path), Giant.load(path, exact=True)
    ways = {
        "prompt, read fast (8-bit activations)": fast.logits,
        "prompt, exact": slow.logits,
        "token by token": lambda ids: apart(fast, ids),
        "token by token, q8 cache": lambda ids: apart(Giant.load(path, kv_cache="q8"), ids),
        "plain float64": None,
    }
    rows = []
    for reference, tops, must in (("llama.cpp", golden, "95 %, 0.13, 1 %"), ("float64", exact, "aim 0.005")):
        for name, way in ways.items():
            if way is None and reference == "float64":
                continue
            against = Against()
            for prompt, top, ours in zip(prompts, tops, plain, strict=True):
                against.add(log_softmax(way(prompt["ids"])) if way else ours, top, prompt["ids"])
            rows.append(against.row(f"{name} against {reference}", must))
    head = ["what", "top-1", "mean Δ log p", "largest", "likelihood", "must"]
    print(table(f"Exactness on the golden file, {Path(path).name}", head, rows))


if __name__ == "__main__":
    main()
