"""It can be read: what SmolLM2-135M (llama.cpp) pays for a newborn's replies, against held-out lines of nonames.txt.

Usage: python benchmarks/readable.py --model smollm2.gguf [--llama-python PYTHON] [--show]
Needs llama-cpp-python, or transformers with gguf and accelerate, in the Python given by --llama-python (default: this).
A tenth of nonames.txt is held out: the newborn reads the rest, answers fifty questions, and both are scored line by line in bits per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys

from common import ROOT, fresh_home, table

QUESTIONS = """Hello.|Who are you?|How are you today?|What can you do?|Tell me a story.|What is the sea?|Do you like music?|I am sad.
What is trust?|Good morning.|Where do you live?|What is a river?|Why does it rain?|Can you count?|What do you remember?
Are you alive?|Tell me about bread.|What is time?|I have a cat.|What should I cook?|Do you sleep?|What is a machine?
Thank you.|What is the moon?|How old are you?|Do you dream?|What is friendship?|My garden is dry.|I am tired.|Explain gravity.
What is a number?|Do you know any poems?|What is winter like?|I had a bad day.|What makes you happy?|Can you learn?
What is a tree?|Who made you?|Is it late?|What is fire?|I am learning to swim.|What is a book for?|Tell me a joke.
What is hope?|Do you know my name?|What is language?|How do birds fly?|What is a city?|I will travel tomorrow.|Goodbye."""

SCORER = """
import json, os, sys
import numpy as np
path = sys.argv[1]
try:
    import llama_cpp
    model = llama_cpp.Llama(path, n_ctx=1024, logits_all=True, verbose=False, n_threads=2)

    def logits(text):
        tokens = ([model.token_bos()] + model.tokenize(text.encode(), add_bos=False))[:1000]
        model.reset()
        model.eval(tokens)
        return tokens, np.array(model.scores[: len(tokens)], np.float64)
except ImportError:  # the same weights, read by transformers: same figures within a few thousandths
    import torch, transformers
    where = dict(pretrained_model_name_or_path=os.path.dirname(path) or ".", gguf_file=os.path.basename(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    def logits(text):
        tokens = ([tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False)["input_ids"])[:1000]
        with torch.no_grad():
            return tokens, model(torch.tensor([tokens])).logits[0].double().numpy()

for line in sys.stdin:
    tokens, scores = logits(json.loads(line))
    scores = scores[:-1]
    top = scores.max(1)
    log_z = top + np.log(np.exp(scores - top[:, None]).sum(1))
    nats = (log_z - scores[np.arange(len(tokens) - 1), tokens[1:]]).sum()
    print(json.dumps(nats / np.log(2)), flush=True)
"""


def score(python: str, model: str, texts: list[str]) -> float:
    """Bits per byte over all texts, each on its own."""
    lines = "\n".join(json.dumps(t) for t in texts) + "\n"
    result = subprocess.run([python, "-c", SCORER, model], input=lines, capture_output=True, text=True, check=True)
    bits = [json.loads(line) for line in result.stdout.splitlines()]
    return sum(bits) / sum(len(t.encode()) for t in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("ORGANISM_MODEL"), help="or ORGANISM_MODEL")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="let it train in the background for so long before it is asked"
    )
    options = parser.parse_args()
    if not options.model:
        print("Left out: it needs --model PATH, a GGUF of SmolLM2-135M.")
        return
    import organism as module

    lines = (ROOT / "nonames.txt").read_text().splitlines()
    held = [line for i, line in enumerate(lines) if i % 10 == 5]
    rest = "\n".join(line for i, line in enumerate(lines) if i % 10 != 5) + "\n"
    module.seed_corpus = lambda: rest.encode()
    questions = [q.strip() for q in QUESTIONS.replace("\n", "|").split("|") if q.strip()]
    ratios = []
    reference = [line.split(": ", 1)[-1] if line[:3] in ("H: ", "A: ") else line for line in held if len(line) > 20]
    base = score(options.llama_python, options.model, reference)
    for seed in range(options.seeds):
        with fresh_home() as home, module.Organism(home, kernels="wait", seed=seed) as life:
            if options.seconds:
                _ = life.learner
                life._burst(force=True, seconds=options.seconds)
            replies = [life.say(q).text for q in questions]
        if options.show:
            for question, reply in zip(questions, replies, strict=True):
                print("H:", question, "\nA:", reply)
        bits = score(options.llama_python, options.model, [r for r in replies if r])
        ratios.append(bits / base)
        print(
            f"seed {seed}: replies {bits:.3f}, held-out lines {base:.3f} bits per byte, ratio {bits / base:.3f}",
            flush=True,
        )
    assert not math.isnan(ratios[0])
    print(table("It can be read", ["replies", "held-out lines (bits/byte)", "ratio, median", "must", "aim"],
                [(len(questions) * options.seeds, base, statistics.median(ratios), "2.0", "1.4")]))  # fmt: skip


if __name__ == "__main__":
    main()
