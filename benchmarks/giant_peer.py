"""llama.cpp as the giant's peer: a worker that measures on request. Run by giant_speed.py with the peer's own Python.

Usage: python benchmarks/giant_peer.py MODEL.gguf [mapped | TOKENS OUT.npy]
mapped: weights stay in the file, as they are there. With tokens (a JSON list) it writes their logits and ends. Else it
reads a JSON object a line from stdin, {"prompt", "generate", "threads", "tokens"?} (tokens: which ones), and writes
{"prefill_s", "token_s": [...]}.
"""

from __future__ import annotations

import json
import sys
import time


def main(model_path: str, is_mapped: str = "") -> None:
    import llama_cpp as L

    L.llama_backend_init()
    settings = L.llama_model_default_params()
    settings.use_extra_bufts = not is_mapped  # its repacked copies of weights have to be in memory
    model = L.llama_model_load_from_file(model_path.encode(), settings)
    contexts: dict[int, object] = {}

    def context(size: int) -> object:
        """Contexts are kept, by size: making one takes longer than a measurement."""
        if size not in contexts:
            params = L.llama_context_default_params()
            params.n_ctx, params.n_threads, params.n_threads_batch, params.n_batch = size, 2, 2, 512
            contexts[size] = L.llama_init_from_model(model, params)
        return contexts[size]

    for line in sys.stdin:
        wish = json.loads(line)
        prompt, generate, threads = wish["prompt"], wish["generate"], wish["threads"]
        ctx = context(-(-(prompt + generate + 8) // 256) * 256)
        L.llama_set_n_threads(ctx, threads, threads)
        L.llama_memory_clear(L.llama_get_memory(ctx), True)

        def feed(tokens: list[int], ctx=ctx) -> None:
            for i in range(0, len(tokens), 512):
                piece = tokens[i : i + 512]
                array = (L.llama_token * len(piece))(*piece)  # must outlive the call: the batch only points to it
                assert L.llama_decode(ctx, L.llama_batch_get_one(array, len(piece))) == 0
            L.llama_synchronize(ctx)

        given = wish.get("tokens") or [100 + i % 5000 for i in range(prompt)] + [700 + i for i in range(generate)]
        began = time.perf_counter()
        feed(given[:prompt])
        took, each = time.perf_counter() - began, []
        for i in range(generate):
            began = time.perf_counter()
            feed([given[prompt + i]])
            each.append(time.perf_counter() - began)
        print(json.dumps({"prefill_s": took, "token_s": each}), flush=True)


def logits(model_path: str, tokens: str, out: str) -> None:
    """Write the logits after each of the tokens (a JSON list): float32 [n, vocabulary], as .npy."""
    import llama_cpp
    import numpy as np

    ids = json.loads(tokens)
    model = llama_cpp.Llama(model_path, n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    model.eval(ids)
    np.save(out, np.array(model.scores[: len(ids)], np.float32))


if __name__ == "__main__":
    (logits if len(sys.argv) == 4 else main)(*sys.argv[1:])
