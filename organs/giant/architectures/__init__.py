"""Architectures: each a short file that records a program of shared layers, with one function `record(recorder)`."""

from __future__ import annotations

import importlib

from organs.giant.gguf import GGUFError, GGUFFile
from organs.giant.program import Recorder

FILES = {  # general.architecture: file
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen", "qwen3": "qwen",
    "gemma2": "gemma", "gemma3": "gemma", "qwen2moe": "qwen_moe", "qwen3moe": "qwen_moe", "olmoe": "qwen_moe",
    "gpt-oss": "gpt_oss", "qwen3next": "qwen_next", "qwen35": "qwen_next", "qwen35moe": "qwen_next",
}  # fmt: skip


def check(file: GGUFFile) -> str:
    """The architecture's name. Raises GGUFError for one that is not supported."""
    name = file.architecture
    if name not in FILES:
        raise GGUFError(f"{file.path}: the architecture {name!r} is not supported; supported are {', '.join(FILES)}")
    return name


def record(recorder: Recorder) -> None:
    """Record the model of the recorder's file. Raises GGUFError for what is not supported."""
    name = FILES[check(recorder.file)]
    if name == "llama" and recorder.has("blk.0.ffn_gate_inp.weight"):
        name = "mixtral"
    importlib.import_module(f"organs.giant.architectures.{name}").record(recorder)
