"""A big mixture of experts on this machine: the giant against llama.cpp, in memory, and held to a half and a quarter of it.

Usage: python benchmarks/giant_experts.py --make FILE.gguf          (writes a Qwen3-Next with true widths and 8 layers, 7.9 GB)
       python benchmarks/giant_experts.py FILE.gguf [--peer PYTHON]  (the table; PYTHON has llama-cpp-python)
       python benchmarks/giant_experts.py FILE.gguf --ram 0.5 [--peer PYTHON]  (held to half of the file's size)
       python benchmarks/giant_experts.py --agree --peer PYTHON    (needs transformers)
       python benchmarks/giant_experts.py FILE.gguf --plan           (what `giant plan` foretells, beside what comes)
       python benchmarks/giant_experts.py FILE.gguf --routes         (how its routing is distributed)

The file's weights are random, made to route like text: a constant number in every embedding gives each layer's experts
popularities p ∝ rank^-0.8 by a random permutation (seed 0); the rest of the router sees the token. Tokens belong to topics
of 64 that share most of their embedding, and the text stays in its topic with probability 0.95: so experts stick.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import resident_mb, table

WIDTH, VOCABULARY, EXPERTS, USED, INSIDE = 2048, 151_936, 512, 10, 512
KEY_HEADS, VALUE_HEADS, HEAD, KERNEL = 16, 32, 128, 4
QUERIES, KV_HEADS, ATTENTION_HEAD = 16, 2, 256
LEAN = 0.44  # with normal noise, logits -0.44 ln(rank) make the best ten of 512 as popular as rank^-0.8 (by simulation)
CONSTANT, TOPIC, STAY = 8.0, 64, 0.95
EMBEDDED = 0.8  # share of a topic in a token's embedding, as a length (0.8² + 0.6² = 1)
LOUD = 0.35  # how much a layer adds to the stream, beside what is in it
NOISE = 1.28  # standard deviation of the logits that the token decides: that of a Gumbel distribution


# --- Making the file. ---


def random_q4(rng: np.random.Generator, rows: int, columns: int, size: float) -> np.ndarray:
    """uint8 [rows, bytes]: a Q4_K matrix of independent numbers, uniform, mean 0, standard deviation `size`."""
    n = rows * columns // 256
    blocks = rng.integers(0, 256, (n, 144), np.uint8)
    step = size / (32 * math.sqrt((16**2 - 1) / 12))  # all scales and minima are 32, the codes 0 to 15
    blocks[:, 0:2] = np.full((n, 1), step, np.float16).view(np.uint8)
    blocks[:, 2:4] = np.full((n, 1), 7.5 * step, np.float16).view(np.uint8)
    blocks[:, 4:12], blocks[:, 12:16] = 32, 0  # six-bit fields: the first four scales and minima are 32 …
    blocks[:, 4:12] |= 0x80  # … and the top bits of the others, whose low ones are zero, too
    return blocks.reshape(rows, -1)


def tensors(layers: int, experts: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], str, Any]]:
    """(name, shape, format, what makes the bytes) in the order of the file."""
    from organs.giant.quantise import quantise

    rng = np.random.default_rng(0)
    pool = random_q4(rng, 4096, WIDTH, 1.0)  # matrices are cut out of it, at random places, with their own size

    def q4(*shape: int, size: float = 1.0):
        blocks = math.prod(shape) // 256

        def make() -> np.ndarray:
            flat, out = pool.reshape(-1, 144), np.empty((blocks, 144), np.uint8)
            at = 0
            while at < blocks:
                begin = int(rng.integers(0, len(flat) // 2))
                n = min(blocks - at, len(flat) - begin)
                out[at : at + n] = flat[begin : begin + n]
                at += n
            step = size / math.sqrt(shape[-1]) / (32 * math.sqrt((16**2 - 1) / 12))
            out[:, 0:2] = np.full((1, 1), step, np.float16).view(np.uint8)
            out[:, 2:4] = np.full((1, 1), 7.5 * step, np.float16).view(np.uint8)
            return out

        return shape, "Q4_K", make

    def f32(array: np.ndarray):
        return array.shape, "F32", lambda: np.ascontiguousarray(array, np.float32).view(np.uint8)

    def embedding() -> np.ndarray:
        topics = rng.standard_normal((-(-vocabulary // TOPIC), WIDTH), np.float32)
        out = []
        for first in range(0, vocabulary, 8192):
            ids = np.arange(first, min(first + 8192, vocabulary))
            rows = EMBEDDED * topics[ids // TOPIC] + math.sqrt(1 - EMBEDDED**2) * rng.standard_normal(
                (len(ids), WIDTH), np.float32
            )
            rows[:, 0] = CONSTANT
            out.append(quantise(rows, "Q4_K"))
        return np.concatenate(out)

    def router(layer: int) -> np.ndarray:
        weights = NOISE / math.sqrt(WIDTH) * rng.standard_normal((experts, WIDTH), np.float32)
        ranks = 1 + np.random.default_rng((0, layer)).permutation(experts)
        loudness = math.sqrt(1 + LOUD**2 * (2 * layer + 1))  # of the stream by then; the norm divides by it
        weights[:, 0] = -LEAN * np.log(ranks) * loudness / CONSTANT
        return weights

    yield "token_embd.weight", (vocabulary, WIDTH), "Q4_K", embedding
    yield "output_norm.weight", *f32(np.ones(WIDTH))
    yield "output.weight", *q4(vocabulary, WIDTH)
    channels, values = 2 * KEY_HEADS * HEAD + VALUE_HEADS * HEAD, VALUE_HEADS * HEAD
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", *f32(np.ones(WIDTH))
        if (layer + 1) % 4:
            yield block + "attn_qkv.weight", *q4(channels, WIDTH)
            yield block + "attn_gate.weight", *q4(values, WIDTH)
            yield block + "ssm_ba.weight", *q4(2 * VALUE_HEADS, WIDTH)
            yield block + "ssm_conv1d.weight", *f32(rng.standard_normal((channels, KERNEL)) / 2)
            yield block + "ssm_dt.bias", *f32(rng.uniform(-4, 0, VALUE_HEADS))
            yield block + "ssm_a", *f32(-rng.uniform(0.05, 1, VALUE_HEADS))
            yield block + "ssm_norm.weight", *f32(np.ones(HEAD))
            yield block + "ssm_out.weight", *q4(WIDTH, values, size=2 * LOUD)
        else:
            yield block + "attn_q.weight", *q4(2 * QUERIES * ATTENTION_HEAD, WIDTH)
            yield block + "attn_k.weight", *q4(KV_HEADS * ATTENTION_HEAD, WIDTH)
            yield block + "attn_v.weight", *q4(KV_HEADS * ATTENTION_HEAD, WIDTH)
            yield block + "attn_q_norm.weight", *f32(np.ones(ATTENTION_HEAD))
            yield block + "attn_k_norm.weight", *f32(np.ones(ATTENTION_HEAD))
            yield block + "attn_output.weight", *q4(WIDTH, QUERIES * ATTENTION_HEAD, size=8 * LOUD)
        yield block + "post_attention_norm.weight", *f32(np.ones(WIDTH))
        yield block + "ffn_gate_inp.weight", *f32(router(layer))
        for name, shape in (("gate", (INSIDE, WIDTH)), ("up", (INSIDE, WIDTH)), ("down", (WIDTH, INSIDE))):
            size = 3 * LOUD if name == "down" else 1.0
            yield f"{block}ffn_{name}_exps.weight", *q4(experts, *shape, size=size)
            yield f"{block}ffn_{name}_shexp.weight", *q4(*shape, size=size)
        yield block + "ffn_gate_inp_shexp.weight", *f32(rng.standard_normal(WIDTH) / math.sqrt(WIDTH))


def make(path: Path, layers: int = 8, experts: int = EXPERTS, vocabulary: int = VOCABULARY) -> None:
    """Write the file."""
    import gguf

    from organs.giant.convert import _add
    from organs.giant.formats import FORMATS

    name = "qwen3next"
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, name)
    facts: dict[str, Any] = {
        "block_count": layers, "context_length": 32768, "embedding_length": WIDTH, "feed_forward_length": 5632,
        "attention.head_count": QUERIES, "attention.head_count_kv": KV_HEADS, "attention.key_length": ATTENTION_HEAD,
        "attention.value_length": ATTENTION_HEAD, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e7,
        "rope.dimension_count": ATTENTION_HEAD // 4, "expert_count": experts, "expert_used_count": min(USED, experts),
        "expert_feed_forward_length": INSIDE, "expert_shared_feed_forward_length": INSIDE, "ssm.conv_kernel": KERNEL,
        "ssm.state_size": HEAD, "ssm.group_count": KEY_HEADS, "ssm.time_step_rank": VALUE_HEADS,
        "ssm.inner_size": VALUE_HEADS * HEAD, "full_attention_interval": 4, "vocab_size": vocabulary,
    }  # fmt: skip
    tokens = [f"<{i}>" for i in range(vocabulary)]
    tokens[: len(BYTES)] = BYTES
    facts = {f"{name}.{key}": value for key, value in facts.items()} | {
        "general.name": "Random Qwen3-Next", "general.file_type": 15, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * vocabulary, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    tokens[300] = "ab"
    for key, value in facts.items():
        _add(writer, key, value)
    todo = list(tensors(layers, experts, vocabulary))
    for key, shape, form, _ in todo:
        f = FORMATS[form]
        writer.add_tensor_info(key, (*shape[:-1], shape[-1] // f.block * f.nbytes), np.dtype(np.uint8),
                               math.prod(shape) // f.block * f.nbytes, gguf.GGMLQuantizationType[form])  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, _, data in todo:
        writer.write_tensor_data(data().reshape(-1))
    writer.close()
    part.replace(path)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in plain]
    return [chr(n) for n in plain] + [chr(256 + i) for i in range(len(others))]


BYTES = _byte_tokens()


def text(n: int, vocabulary: int, seed: int = 1) -> list[int]:
    """Tokens that stay in a topic for a while."""
    rng, out, topic = np.random.default_rng(seed), [], 0
    for _ in range(n):
        if rng.random() > STAY or not out:
            topic = int(rng.integers(0, vocabulary // TOPIC))
        out.append(topic * TOPIC + int(rng.integers(0, TOPIC)))
    return out


# --- Measuring. ---


def routes(path: Path, n: int = 512) -> None:
    """How the file routes: the exponent of popularity, how many experts two tokens in a row share, how far it can be foretold."""
    from organs.giant import Giant

    giant = Giant.load(path)
    giant.session().feed(text(n, giant.vocab_size))
    chosen = giant.routes(n)
    giant.close()
    rows = []
    for layer, some in enumerate(chosen):
        counts = np.sort(np.bincount(some.reshape(-1), minlength=int(chosen.max()) + 1))[::-1]
        used = counts[counts > 0]
        ranks = np.arange(1, len(used) + 1)
        half = slice(0, max(2, len(used) // 2))
        slope = -np.polyfit(np.log(ranks[half]), np.log(used[half]), 1)[0]
        shared = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(some[:-1], some[1:])])
        rows.append(
            [layer, len(used), float(slope), float(counts[: len(counts) // 2].sum() / counts.sum()), float(shared)]
        )
    head = ["layer", "experts used", "p ∝ rank^-…", "share of the upper half", "kept from token to token"]
    print(table(f"Routing of {n} tokens", head, rows))


def replay(routes: list[np.ndarray], slots: int, warm: int) -> dict[str, float]:
    """Misses a token, behind the first `warm` ones, of LRU and of Belady's optimum with so many slots for all layers.

    routes: of every token int64 [layers, used].
    """
    order = [(layer, int(e)) for route in routes for layer, some in enumerate(route) for e in some]
    later: list[int] = [0] * len(order)
    last: dict[tuple[int, int], int] = {}
    for i in range(len(order) - 1, -1, -1):
        later[i] = last.get(order[i], 1 << 60)
        last[order[i]] = i
    begin, out = warm * routes[0].size, {}
    for policy in ("LRU", "Belady"):
        held: dict[tuple[int, int], int] = {}  # what decides: the last use, or minus the next one
        misses = 0
        for i, key in enumerate(order):
            if key not in held:
                misses += i >= begin
                if len(held) >= slots:
                    del held[min(held, key=held.__getitem__)]
            held[key] = i if policy == "LRU" else -later[i]
        out[policy] = misses / (len(routes) - warm)
    return out


def disk_speed(path: Path, nbytes: int, seconds: float = 4.0) -> float:
    """Bytes a second of reading pieces of an expert's size at random places, around the page cache, four at a time."""
    from concurrent.futures import ThreadPoolExecutor

    size, rng, piece = path.stat().st_size, np.random.default_rng(2), -(-nbytes // 3 // 4096) * 4096
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    end, done = time.perf_counter() + seconds, []

    def read(_: int) -> None:
        buffer = mmap.mmap(-1, piece)
        while time.perf_counter() < end:
            done.append(os.preadv(handle, [buffer], int(rng.integers(0, (size - piece) // 4096)) * 4096))

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    os.close(handle)
    return sum(done) / (time.perf_counter() - began)


def held(asked: argparse.Namespace) -> None:
    """Writing with experts on disk: what of the roof is reached, how good the choice of what to keep is, llama.cpp beside it."""
    from organs.giant import Giant

    limit, begin = asked.ram * asked.model.stat().st_size, 64 + asked.warm
    giant = Giant.load(
        asked.model, threads=asked.threads, offload="disk", ram=limit / 1e9, prefetch=not asked.no_prefetch
    )
    tokens = text(begin + asked.generate, giant.vocab_size)
    session, chosen = giant.session(), []
    session.feed(tokens[:64])
    for token in tokens[64 : 64 + asked.warm]:
        session.feed([token])
        chosen.append(giant.routes(1)[:, 0].copy())
    whole = Process(asked.model, asked.threads)
    before, each, in_memory = giant.residency.report(), [], []
    for at in range(begin, begin + asked.generate, TURN):  # in turns, since the machine's speed changes
        for token in tokens[at : at + TURN]:
            began = time.perf_counter()
            session.feed([token])
            each.append(time.perf_counter() - began)
            chosen.append(giant.routes(1)[:, 0].copy())
        in_memory += whole.measure(tokens[at : at + TURN])
    whole.close()
    after = giant.residency.report()
    peak = resident_mb(os.getpid())
    giant.close()
    n = len(each)
    change = {
        key: after[key] - before[key]
        for key in ("wanted", "hits", "guessed", "right", "ahead", "bytes", "reading", "stall")
    }
    replayed = replay(chosen, after["slots"], asked.warm)
    speed = disk_speed(asked.model, after["slot_bytes"])
    by_disk = speed / (replayed["LRU"] * after["slot_bytes"])
    mine, in_memory = n / sum(each), n / sum(in_memory)
    roof = min(in_memory, by_disk)
    theirs = math.nan
    if asked.peer:
        with open(asked.model, "rb") as file:  # pages that are in memory already would not count against the limit
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        peer = Peer(asked.peer, asked.model, int(limit))
        theirs = 1 / peer.measure(tokens[: 64 + asked.peer_tokens], 64, asked.threads)[1]
        peer.close()
    misses = (change["wanted"] - change["hits"]) / n
    rows = [
        ["decode, tokens/s", mine], ["a token, ms: mean", 1e3 / mine], ["a token, ms: median", 1e3 * float(np.median(each))],
        ["waited for experts, ms a token", 1e3 * change["stall"] / n], ["reading, ms a token", 1e3 * change["reading"] / n],
        ["llama.cpp held to the same memory", theirs], ["ratio", mine / theirs],
        ["all in memory, tokens/s", in_memory], ["random reads / misses of an LRU, tokens/s", by_disk],
        ["of the roof, the lesser of both", mine / roof],
        ["random reads, GB/s", speed / 1e9], ["hit rate", change["hits"] / change["wanted"]],
        ["experts missed a token", misses], ["of an LRU of that size", replayed["LRU"]], ["of Belady's optimum", replayed["Belady"]],
        ["read, MB a token", change["bytes"] / n / 1e6], ["guesses that came true", change["right"] / max(1, change["guessed"])],
        ["reading hidden behind computing", 1 - change["stall"] / max(1e-9, change["reading"])],
        ["experts in memory", f"{after['slots']} of {EXPERTS * len(chosen[0])}"], ["peak resident, MB", peak],
        ["limit × 1.1 + 200 MB", 1.1 * limit / 1e6 + 200],
    ]  # fmt: skip
    what = "without prefetch" if asked.no_prefetch else "with prefetch"
    print(table(f"{asked.model.name}, experts on disk, {limit / 1e9:.2f} GB, {what}", ["measure", "value"], rows))


WAYS = {  # how it is loaded: (device, offload, memory as a share of the file)
    "all in memory": ("cpu", "none", 0.0), "disk, half": ("cpu", "disk", 0.5), "disk, a quarter": ("cpu", "disk", 0.25),
    "torch, none": ("torch", "none", 0.0), "torch, experts": ("torch", "experts", 0.0), "torch, updown": ("torch", "updown", 0.0),
}  # fmt: skip


def foretold(asked: argparse.Namespace) -> None:
    """What `giant plan` says of each way, measured a moment before, beside what the way then does."""
    from organs.giant import Giant, open_gguf, plan
    from organs.giant.accelerator import Accelerator
    from organs.giant.giant import default_threads

    rows, threads = [], asked.threads or default_threads()
    for name, (device, offload, share) in WAYS.items():
        if asked.only and asked.only not in name:
            continue
        ram = (share and (asked.ram or share)) * asked.model.stat().st_size or None
        with open_gguf(asked.model) as file:
            sizes = plan.Sizes.of(file, 1024, "f16")
            accelerator = Accelerator(device) if device != "cpu" else None
            machine = plan.measured(file, sizes, threads, accelerator, ram)
        said = next(choice for choice in plan.choices(sizes, machine) if choice.offload == offload)
        if not said.fits:
            rows.append([name, "does not fit", "", "", said.reason])
            continue
        giant = Giant.load(asked.model, context=1024, threads=threads, device=device, offload=offload,
                           ram=ram / 1e9 if ram else None)  # fmt: skip
        tokens, each = text(64 + asked.warm + asked.generate, giant.vocab_size), []
        session = giant.session()
        session.feed(tokens[:64])
        for i, token in enumerate(tokens[64:]):
            if i == asked.warm:
                before = counted(giant)
            began = time.perf_counter()
            session.feed([token])
            each.append(time.perf_counter() - began)
        came = {key: (value - before[key]) / asked.generate for key, value in counted(giant).items()}
        giant.close()
        measured = asked.generate / sum(each[-asked.generate :])
        detail = said.reason
        if came:
            detail += f"; {came['wanted'] - came['hits']:.1f} were away, {1e3 * came['stall']:.1f} ms waited"
        rows.append([name, said.tokens_per_s, measured, f"{100 * (said.tokens_per_s / measured - 1):+.0f} %", detail])
        print(f"{name}: {rows[-1][1]:.3g} foretold, {measured:.3g} came", file=sys.stderr, flush=True)
    print(f"{machine.bandwidth / 1e9:.1f} GB/s of products; an expert from disk {1e3 * machine.disk.first:.2f} ms and "
          f"{1e3 * machine.disk.each:.2f} ms for each, {sizes.expert / 1e6:.2f} MB\n")  # fmt: skip
    head = ["way", "foretold, tokens/s", "measured", "off by (25 %)", "foretold because; what came"]
    print(table(f"{asked.model.name}: what `giant plan` foretells, and what came", head, rows))


def counted(giant: Any) -> dict[str, float]:
    """Counters of experts that come from elsewhere, since the model was loaded; none where all are there."""
    if giant.residency is not None:
        report = giant.residency.report()
    elif giant.accelerator is not None:
        report = giant.accelerator.report()
    else:
        return {}
    return {key: report[key] for key in ("wanted", "hits", "stall")}


TURN = 16  # tokens


class Process:
    """The giant with the whole model in memory, in a process of its own."""

    def __init__(self, model: Path, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(model), "--serve", "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.measure(text(64 + TURN, 1000))

    def measure(self, tokens: list[int]) -> list[float]:
        """Seconds of each token."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(tokens), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(asked: argparse.Namespace) -> None:
    """What Process runs."""
    from organs.giant import Giant

    giant = Giant.load(asked.model, threads=asked.threads)
    session = giant.session()
    for line in sys.stdin:
        each = []
        for token in json.loads(line):
            began = time.perf_counter()
            session.feed([token])
            each.append(time.perf_counter() - began)
        print(json.dumps(each), flush=True)


class Peer:
    """llama.cpp in a process of its own Python; with a limit, in a memory cgroup (version 1) of so many bytes."""

    def __init__(self, python: str, model: Path, limit: int = 0):
        script = Path(__file__).with_name("giant_peer.py")
        command = [python, str(script), str(model)]
        if limit:
            self.group = Path("/sys/fs/cgroup/memory/giant-experts")
            self.group.mkdir(exist_ok=True)
            (self.group / "memory.limit_in_bytes").write_text(str(limit))
            command.append("mapped")
            command = ["sh", "-c", f'echo $$ > {self.group}/cgroup.procs; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)  # fmt: skip

    def measure(self, tokens: list[int], prompt: int, threads: int) -> tuple[float, float]:
        """(seconds of the prompt, median seconds of a token behind it)."""
        assert self.process.stdin and self.process.stdout
        wish = dict(prompt=prompt, generate=len(tokens) - prompt, threads=threads, tokens=tokens)
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["prefill_s"], float(np.median(answer["token_s"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def ours(giant: Any, tokens: list[int], prompt: int) -> tuple[float, float]:
    """As Peer.measure."""
    giant.prefixes.clear()
    session, each = giant.session(), []
    began = time.perf_counter()
    session.feed(tokens[:prompt])
    first = time.perf_counter() - began
    for token in tokens[prompt:]:
        began = time.perf_counter()
        session.feed([token])
        each.append(time.perf_counter() - began)
    return first, float(np.median(each))


def active_bytes(giant: Any) -> int:
    """What one token reads: everything but the table of embeddings, and of the experts those that are used."""
    get = lambda key: giant.file.get(f"{giant.file.architecture}.{key}", int)
    share = get("expert_used_count") / get("expert_count")
    sizes = {name: info.nbytes for name, info in giant.file.tensors.items()}
    return int(
        sum(size * (share if "_exps" in name else 1) for name, size in sizes.items() if name != "token_embd.weight")
    )


AGREEING = ("mixtral", "qwen2moe", "qwen3moe", "olmoe", "gpt-oss", "qwen3next", "qwen35", "qwen35moe")


def agree(python: str, names: Sequence[str] = AGREEING) -> None:
    """Small random models of every architecture, converted, by llama.cpp and by the giant: how far they agree."""
    import tempfile

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from organs.giant import Giant
    from tests.giant.test_experts import SIZE, converted

    tokens, rows = np.random.default_rng(4).integers(0, SIZE, 100).tolist(), []
    for name in names:
        for kind in ("f32", "q8_0"):
            with tempfile.TemporaryDirectory() as folder:
                _, path = converted(name, Path(folder), kind)
                giant = Giant.load(path, exact=True)
                mine = giant.logits(tokens)
                giant.close()
                out = Path(folder) / "logits.npy"
                script = str(Path(__file__).with_name("giant_peer.py"))
                done = subprocess.run(
                    [python, script, str(path), json.dumps(tokens), str(out)], capture_output=True, text=True
                )
                if done.returncode:
                    rows.append([name, kind, done.stderr.strip().splitlines()[-1][:80], ""])
                    continue
                theirs = np.load(out)
            p, q = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
                    for x in (theirs.astype(np.float64), mine.astype(np.float64)))  # fmt: skip
            same = float((p.argmax(1) == q.argmax(1)).mean())
            rows.append([name, kind, f"{100 * same:.0f} %", f"{float((np.exp(p) * (p - q)).sum(1).mean()):.1e}"])
    print(
        table(
            "Converted by `giant convert`, read by llama.cpp", ["architecture", "type", "top-1 agreement", "KL"], rows
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="the file that --make wrote")
    parser.add_argument("--make", type=Path, metavar="FILE", help="write the model and stop")
    parser.add_argument("--layers", type=int, default=8, help="of the model that is made")
    parser.add_argument("--experts", type=int, default=EXPERTS, help="of each layer of the model that is made")
    parser.add_argument("--only", metavar="WAY", help="with --plan: the ways whose names have this in them")
    parser.add_argument(
        "--plan", action="store_true", help="compare what `giant plan` foretells with what comes, and stop"
    )
    parser.add_argument("--routes", action="store_true", help="show how the file routes, and stop")
    parser.add_argument(
        "--agree", action="store_true", help="compare logits of small models with llama.cpp's, and stop"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", type=int, default=64, help="tokens of a round")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ram", type=float, metavar="SHARE", help="experts on disk: memory as a share of the file")
    parser.add_argument("--no-prefetch", action="store_true", help="with --ram: nothing is read before it is wanted")
    parser.add_argument("--warm", type=int, default=64, help="with --ram: tokens written before those that are timed")
    parser.add_argument("--peer-tokens", type=int, default=8, help="with --ram: tokens that llama.cpp writes")
    asked = parser.parse_args()
    if asked.make:
        make(asked.make, asked.layers, asked.experts)
        return 0
    if asked.agree:
        if not asked.peer:
            parser.error("--agree needs --peer PYTHON")
        agree(asked.peer)
        return 0
    if asked.model is None:
        parser.error("give the model's file, or --make FILE")
    if asked.routes:
        routes(asked.model)
        return 0
    if asked.serve:
        serve(asked)
        return 0
    if asked.plan:
        foretold(asked)
        return 0
    if asked.ram:
        held(asked)
        return 0
    from organs.giant import Giant
    from organs.giant.roofs import read_roof

    giant = Giant.load(asked.model, threads=asked.threads)
    tokens = text(asked.prompt + asked.generate, giant.vocab_size)
    peer = Peer(asked.peer, asked.model) if asked.peer else None
    mine, theirs, roofs = [], [], []
    for _ in range(
        asked.rounds + 1
    ):  # in turns, since other guests of the machine come and go; the first round warms up
        mine.append(ours(giant, tokens, asked.prompt))
        if peer:
            theirs.append(peer.measure(tokens, asked.prompt, asked.threads))
        roofs.append(read_roof(1 << 30, asked.threads))
    mine, theirs, roof = mine[1:], theirs[1:], max(roofs)
    active, rows = active_bytes(giant), []
    giant.close()
    if peer:
        peer.close()
    for i, (what, count) in enumerate((("prefill", asked.prompt), ("decode", 1))):
        own = count / min(m[i] for m in mine)
        other = count / min(t[i] for t in theirs) if theirs else math.nan
        rows.append([f"{what}, tokens/s", own, other, own / other])
    rows.append(["read while decoding, GB/s", active / min(m[1] for m in mine) / 1e9, "", ""])
    rows.append(["of the bandwidth here", active / min(m[1] for m in mine) / 1e9 / roof, "", ""])
    print(table(f"{asked.model.name}, all in memory, prompt {asked.prompt}, {asked.threads} threads; bandwidth {roof:.1f} GB/s",
                ["measure", "giant", "llama.cpp", "ratio"], rows))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
