"""The house itself: the map of chapters, the import rules, the Makefile, and that what the pages say can be run.

Run alone: pytest -n 0 tests/test_house.py
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import launcher
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OURS = {".venv", "build", "checkpoints"}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if not NOT_OURS & set(p.relative_to(ROOT).parts))
HEAVY = "numba torch rich click click_default_group sqlite_utils safetensors tomlkit platformdirs scipy".split()


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


# --- organism.py: its map and its manners. ---


def test_the_docstring_lists_the_chapters_that_the_banners_name():
    source = (ROOT / "organism.py").read_text(encoding="utf-8")
    rule = "#" * 96
    banners = re.findall(rf"^{rule}\n# Chapter (\d+)\. (.+)\n{rule}$", source, re.MULTILINE)
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    listed = re.findall(r"^ {4,5}(\d+)\. (.+?) {2,}\S", docstring, re.MULTILINE)
    assert banners == listed
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))


def test_each_banner_is_followed_by_a_paragraph():
    source = (ROOT / "organism.py").read_text(encoding="utf-8")
    bare = re.findall(r"^# Chapter (\d+\. .+)\n#{96}\n(?!# \S.{40,})", source, re.MULTILINE)
    assert not bare, f"chapters that do not say what they own and hide: {bare}"


def test_a_bare_import_brings_in_nothing_heavy():
    result = python(
        "-c", f"import sys, organism; print([m for m in sys.modules if m in {HEAVY} or m.startswith('organs')])"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_help_and_version_need_no_kernels():
    code = (
        "import sys, organism; organism.main(['--help']); organism.main(['--version']); "
        "print([m for m in ('numba', 'torch', 'rich', 'sqlite_utils') if m in sys.modules])"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def top_imports(tree: ast.Module):
    """Names that are imported when the module is: function bodies are left out."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def all_imports(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_organism_imports_only_the_standard_library_and_numpy_at_the_top():
    names = set(top_imports(ast.parse((ROOT / "organism.py").read_text(encoding="utf-8"))))
    foreign = {n for n in names if n.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "__future__"}}
    assert not foreign


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_import_rule(path):
    parts = path.relative_to(ROOT).parts
    imports = set(all_imports(ast.parse(path.read_text(encoding="utf-8"))))
    if parts[0] not in ("tests", "benchmarks"):
        wrong = {n for n in imports if n.partition(".")[0] in ("tests", "benchmarks")}
        assert not wrong, f"nothing imports tests or benchmarks, but {wrong}"
    if parts[0] == "organs" and len(parts) > 2:  # another organ only through its public face: its package
        strangers = {n for n in imports if n.startswith("organs.") and n.split(".")[1] != parts[1]}
        faces = {f"organs.{organ.name}" for organ in (ROOT / "organs").iterdir() if organ.is_dir()}
        paths = {n: ROOT / n.replace(".", "/") for n in strangers}
        modules = {n for n, at in paths.items() if at.is_dir() or at.with_suffix(".py").is_file()}
        assert modules <= faces, f"an organ's insides are its own, but {sorted(modules - faces)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_data_is_evaluated(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.relative_to(ROOT).parts[0] == "tests":
        return
    assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & set(all_imports(tree))
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not {"eval", "exec"} & calls


# --- The first breath. ---


def test_the_first_breath_is_long_enough_and_well_formed():
    data = (ROOT / "nonames.txt").read_bytes()
    text = data.decode("utf-8")
    assert len(data) >= 64 * 1024 and b"\r" not in data and text.endswith("\n") and not text.endswith("\n\n")
    lines = text.split("\n")
    answers = [line for line in lines if line.startswith("A: ")]
    assert len(answers) > 400 and all(line[-1] in ".!?。！？" for line in answers)
    spoken = sum(len(line.encode()) + 1 for line in lines if line[:3] in ("H: ", "A: "))
    assert 0.5 < spoken / len(data) < 0.85
    for alphabet in ("[äöüß]", "[а-яё]", "[一-龥]", r"(?m)^def \w+\("):
        assert len(re.findall(alphabet, text)) >= 4, alphabet


# --- Packaging and the Makefile. ---


def test_extras_and_markers_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"giant", "torch", "agent", "memory", "server", "swarm", "plot", "all", "dev"}
    assert "torch==2.13.0" in extras["dev"]
    assert project["project"]["scripts"] == {"organism": "organism:main"}
    declared = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    assert declared == {"slow", "soak", "bench", "cuda"}


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "organism.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert version and version[1] == project["project"]["version"]
    assert f"## {version[1]} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_wheel_carries_the_first_breath_where_the_organism_looks_for_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["data-files"] == {"share/organism": ["nonames.txt"]}
    assert '"share" / "organism"' in (ROOT / "organism.py").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_make_targets_that_the_pages_name_exist_and_are_explained():
    targets = make_targets()
    assert {"help", "chat", "test", "bench", "soak", "lint", "docs", "clean"} <= targets
    for page in PAGES:
        named = set(re.findall(r"(?:`|^|\| )make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{page.name} names targets that do not exist: {named - targets}"
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == set(re.findall(r"^  make ([a-z]+) ", shown, re.MULTILINE))


def test_ci_runs_the_tests():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script and "\nmake test\n" in script and os.access(ROOT / ".ci" / "run", os.X_OK)


# --- The pages. ---


def fenced(page: Path, info: str) -> list[str]:
    return re.findall(rf"^```{info}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def runnable_blocks() -> list:
    blocks = [(page.stem, number, block) for page in PAGES for number, block in enumerate(fenced(page, "bash run"), 1)]
    return [pytest.param(block, id=f"{stem}-{number}") for stem, number, block in blocks]


@pytest.mark.parametrize("block", runnable_blocks())
def test_documented_commands_run(block, tmp_path, sample_text):
    """Each fence marked `bash run` in a folder of its own, where notes.txt is 20 KB of text."""
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "organism"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(launcher.program())} "$@"\n')
    program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_bytes(sample_text[:20_000])
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=work,
        env={**os.environ, "PATH": path, "ORGANISM_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert "Traceback" not in result.stderr


def test_documented_python_runs(tmp_path):
    """Fences marked `python run`."""
    blocks = [block for page in PAGES for block in fenced(page, "python run")]
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert result.returncode == 0, f"{block}\n{result.stderr[-2000:]}"


def test_help_texts_in_the_docs_are_the_ones_that_help_prints():
    result = python("docs/generate_cli.py", "--check")
    assert result.returncode == 0, result.stderr


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_each_term_of_the_glossary_is_defined_once():
    terms = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    plain = [term.lower() for term in terms]
    assert len(plain) > 30 and len(set(plain)) == len(plain), sorted({t for t in plain if plain.count(t) > 1})
    assert plain == sorted(plain), "terms in the order of the alphabet"
    needed = "home field body burst prequential gamma syntropy immunity quarantine nonames.txt overlay recall".split()
    assert set(needed) <= set(plain)


def test_every_setting_of_the_config_is_reachable_from_the_docs():
    text = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")
    import organism

    for section in ("body", "tokenizer", "field", "learning", "voice", "memory", "life"):
        assert hasattr(organism.Config(), section) and f"`[{section}]`" in text


def test_no_page_or_source_names_a_registry_or_a_machine():
    hosts = "|".join(
        ("python" + "hosted", "pypi" + r"\.org", "npm" + "js", "download.py" + "torch", "/work" + "/", "/home/[a-z]+/")
    )
    for path in [
        *PAGES,
        *SOURCES,
        *(ROOT / name for name in ("Makefile", "pyproject.toml", "CHANGELOG.md", ".ci/run")),
    ]:
        assert not re.findall(hosts, path.read_text(encoding="utf-8")), path
