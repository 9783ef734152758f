"""Everything compiled (numba). Placeholder until the executor's owner writes it."""


def ready() -> bool:
    return True
