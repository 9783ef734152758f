"""The giant: a runtime of our own for large language models in GGUF files, on the CPU. The public face.

    from organs.giant import Giant
    giant = Giant.load("model.gguf")
    giant.generate([{"role": "user", "content": "Name three rivers."}], seed=1).text
    session = giant.session()
    logits = session.feed([1, 2, 3])      # float32 [vocabulary]: after the last token

Importing it costs nothing: numba and the compiled kernels are imported when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from organs.giant.gguf import GGUFError, GGUFFile, open_gguf
    from organs.giant.giant import ContextFull, Session
    from organs.giant.pull import find
    from organs.giant.text import Chat, Generation, Giant

__all__ = ["Chat", "ContextFull", "GGUFError", "GGUFFile", "Generation", "Giant", "Session", "find", "open_gguf"]

_HOMES = {
    "Giant": "text", "Generation": "text", "Chat": "text", "Session": "giant", "ContextFull": "giant",
    "GGUFError": "gguf", "GGUFFile": "gguf", "open_gguf": "gguf", "find": "pull",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"organs.giant.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'organs.giant' has no attribute {name!r}")
