"""Architectures: each a short file that records a program of shared layers, with one function `record(recorder)`."""

from __future__ import annotations

import importlib

from organs.giant.gguf import GGUFError, GGUFFile
from organs.giant.program import Recorder

FILES = {  # general.architecture: file
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen", "qwen3": "qwen",
    "gemma2": "gemma", "gemma3": "gemma",
}  # fmt: skip


def check(file: GGUFFile) -> str:
    """The architecture's name. Raises GGUFError for one that is not supported."""
    name = file.architecture
    if name not in FILES:
        raise GGUFError(f"{file.path}: the architecture {name!r} is not supported; supported are {', '.join(FILES)}")
    return name


def record(recorder: Recorder) -> None:
    """Record the model of the recorder's file. Raises GGUFError for what is not supported."""
    name = check(recorder.file)
    importlib.import_module(f"organs.giant.architectures.{FILES[name]}").record(recorder)
