"""How a giant is loaded and how it samples where nobody says: from the environment, for every command that takes a model.

What is given comes first, then the environment, then a default. Used by `organism giant …` (commands.py) and by whatever lets a
giant answer in an organism's place (bridge.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from organism import OrganismError, UsageError
from organs.giant import pull
from organs.giant.accelerator import AcceleratorFull
from organs.giant.gguf import GGUFError, open_gguf
from organs.giant.giant import ContextFull
from organs.giant.text import Giant

# Ours is ORGANISM_GIANT_ and the key, theirs is for people who come from Paramecia.
ENVIRONMENT = {
    "MODEL": "PARAMECIA_MODEL_PATH", "TOKENIZER": "PARAMECIA_TOKENIZER_PATH", "CONTEXT": "PARAMECIA_CONTEXT_LENGTH",
    "DEVICE": "", "OFFLOAD": "PARAMECIA_OFFLOAD", "RAM": "", "VRAM": "", "KV_CACHE": "PARAMECIA_KV_CACHE_QUANT",
    "NO_PREFETCH": "PARAMECIA_NO_PREFETCH", "TEMPERATURE": "PARAMECIA_TEMPERATURE", "TOP_P": "PARAMECIA_TOP_P",
    "TOP_K": "PARAMECIA_TOP_K", "REPEAT_PENALTY": "PARAMECIA_REPEAT_PENALTY", "PRESENCE_PENALTY": "PARAMECIA_PRESENCE_PENALTY",
}  # fmt: skip
LOADING = (  # options of every command that loads a model
    "context", "kv_cache", "device", "offload", "ram", "vram", "no_prefetch", "tokenizer", "speculate", "exact",
)  # fmt: skip
CONTEXT = 8192  # tokens at most that a context holds where nobody says how many


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """What is wrong with a file or a request, in the command line's two kinds of errors."""
    try:
        yield
    except (GGUFError, ContextFull, AcceleratorFull) as error:
        raise OrganismError(f"{str(error).rstrip('.')}.") from error
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        raise UsageError(f"{str(error).rstrip('.')}.") from error


def setting(key: str, kind: Callable[[str], Any] = str) -> Any:
    """What the environment says of a key of ENVIRONMENT, or None. Raises UsageError for what is no such value."""
    for name in (f"ORGANISM_GIANT_{key}", ENVIRONMENT[key]):
        given = os.environ.get(name, "").strip() if name else ""
        if given:
            try:
                return kind(given)
            except ValueError as error:
                raise UsageError(f"The environment variable {name} is {given!r}: it should be a number.") from error
    return None


def named(model: str | None) -> str:
    """The model that was named, or else the environment's. Raises UsageError where there is neither."""
    found = model or setting("MODEL")
    if found is None:
        raise UsageError("Which model? Give a path or a name (smollm2), or set ORGANISM_GIANT_MODEL.")
    return found


def sampling() -> dict[str, Any]:
    """The sampling settings that the environment has."""
    keys = dict(temperature=float, top_p=float, top_k=int, repetition_penalty=float, presence_penalty=float)
    names = {"repetition_penalty": "REPEAT_PENALTY"}
    found = {name: setting(names.get(name, name.upper()), kind) for name, kind in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def load(model: str | None, *, threads: int | None = None, say: Callable[[str], None] = lambda text: None, most: int = CONTEXT,
         context: int | None = None, kv_cache: str | None = None, device: str | None = None, offload: str | None = None,
         ram: float | None = None, vram: float | None = None, no_prefetch: bool = False, tokenizer: str | None = None,
         speculate: bool = False, exact: bool = False) -> Giant:  # fmt: skip
    """The model of this name or path; its context is what it was trained for, but at most `most` unless asked for.

    Raises OrganismError, UsageError in one sentence.
    """
    path = pull.find(named(model))
    no_prefetch = no_prefetch or (setting("NO_PREFETCH") or "0").lower() in ("1", "true", "yes")
    with sentences():
        context = context or setting("CONTEXT", int)
        if context is None:
            with open_gguf(path) as file:
                context = min(int(file.metadata.get(f"{file.architecture}.context_length", most)), most)
        giant = Giant.load(
            path, context=context, kv_cache=kv_cache or setting("KV_CACHE") or "f16", threads=threads, exact=exact, say=say,
            device=device or setting("DEVICE") or "auto", offload=offload or setting("OFFLOAD"),
            ram=ram or setting("RAM", float), vram=vram or setting("VRAM", float), prefetch=not no_prefetch, speculate=speculate,
        )  # fmt: skip
        if (other := tokenizer or setting("TOKENIZER")) is not None:
            giant.use_tokenizer(other)
        return giant
