"""What all tests share: no test touches the user's homes, all use the same kernels, hypothesis has no deadline."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import platformdirs
import pytest
from hypothesis import settings

# Before anything changes HOME: kernels compile once for the machine, not once a test.
os.environ.setdefault("ORGANISM_CACHE", str(platformdirs.user_cache_path("organism")))

settings.register_profile("organism", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("organism")

SAMPLE_BYTES = 200_000


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """Point the organism's home, and what a platform derives from the user's home, at a folder of this test."""
    folder = tmp_path_factory.mktemp("user")
    for name in [n for n in os.environ if n.startswith("ORGANISM_") and n != "ORGANISM_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("OUMNIX_DETERMINISTIC", raising=False)
    monkeypatch.setenv("ORGANISM_HOME", str(folder / "organism"))
    for name, below in (
        ("HOME", ""),
        ("USERPROFILE", ""),
        ("XDG_DATA_HOME", ".local/share"),
        ("XDG_CONFIG_HOME", ".config"),
        ("XDG_CACHE_HOME", ".cache"),
        ("XDG_STATE_HOME", ".local/state"),
    ):
        monkeypatch.setenv(name, str(folder / below))
    return folder


def pytest_addoption(parser):
    parser.addoption("--reference", action="store_true", help="live on the reference, as where nothing can be compiled")


@pytest.fixture(autouse=True)
def reference(request, own_home, monkeypatch):
    """With --reference, whatever does not ask for kernels by name lives without."""
    if request.config.getoption("--reference"):
        monkeypatch.setenv("ORGANISM_KERNELS", "off")


@pytest.fixture
def compiled(reference, monkeypatch):
    """For what asks for kernels by name."""
    monkeypatch.delenv("ORGANISM_KERNELS", raising=False)


@pytest.fixture(scope="session")
def sample_text() -> bytes:
    """The first 200,000 bytes of Python's own library, file by file in order of name: real text, always the same."""
    data = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= SAMPLE_BYTES:
            break
    return bytes(data[:SAMPLE_BYTES])
