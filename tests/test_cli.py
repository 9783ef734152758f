"""The program as a user meets it: commands, pipes, signals, exit codes, one sentence for every trouble.   pytest tests/test_cli.py"""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launcher
import pytest

import organism as o

PROGRAM = Path(o.__file__).resolve()
COMMANDS = ["chat", "train", "say", "eval", "status", "quarantine list", "quarantine show", "backup", "doctor"]
SAID = {"text", "source", "surprise_bits", "entropy_bits", "tokens", "seconds"}


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ORGANISM_") or k == "ORGANISM_CACHE"}
    return kept | dict(PYTHONIOENCODING="utf-8", OUMNIX_DETERMINISTIC="1") | more


def run(*arguments, home=None, stdin="", timeout=120, **more):
    """The finished process; stdin and output as text."""
    at = ["--home", str(home)] if home else []
    return subprocess.run([*launcher.program(), *map(str, arguments), *at], input=stdin, capture_output=True, text=True,
                          env=environment(**more), timeout=timeout, cwd=PROGRAM.parent)  # fmt: skip


def start(*arguments, home, **pipes):
    return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, arguments), "--home", str(home)], text=True, env=environment(),
                            cwd=PROGRAM.parent, preexec_fn=heed_control_c, **pipes)  # fmt: skip


def heed_control_c():
    """Whoever runs the tests may ignore it, as a shell does for what it starts with &, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def sentence(finished, code, pattern):
    """One line on stderr that begins with `error: ` and says `pattern`; no traceback; the exit code."""
    assert finished.returncode == code, finished
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(pattern, lines[0]), finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "rivers.txt"
    path.write_text("".join(f"The river {name} is {n} miles long, and the herons of {name} are grey.\n"
                            for n, name in enumerate(["Arve", "Bel", "Corr", "Dun", "Esk", "Farrow", "Glim", "Hale"] * 40)))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def born(tmp_path_factory):
    """A home that was born and spoken with, and is only read by the tests."""
    home = tmp_path_factory.mktemp("born") / "home"
    finished = run("say", "My sister is called Marbeth.", "--json", "--seed", 1, home=home)
    assert finished.returncode == 0, finished
    return home


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    finished = run(*command.split(), "--help")
    assert finished.returncode == 0 and finished.stderr == ""
    for flag in ("--home", "--json", "--quiet", "--seed", "--threads", "--log-level"):
        assert flag in finished.stdout
    assert re.search(rf"Example:\n +organism {command}", finished.stdout)


def test_the_list_of_commands():
    finished = run("--help")
    assert [c for c in COMMANDS if not re.search(rf"^  {c.split()[0]}", finished.stdout, re.MULTILINE)] == []
    assert run("-h").stdout == finished.stdout and o.__version__ in run("--version").stdout


def test_train_takes_the_flags_of_the_design():
    text = run("train", "--help").stdout
    flags = """corpus steps seconds tokens epochs stage engine eval lr batch accum weight-decay max-grad-norm precision
               vocab field log-every save-every strip-tags"""
    assert [flag for flag in flags.split() if f"--{flag} " not in text] == []


def test_importing_brings_no_more_than_numpy():
    heavy = ["click", "rich", "numba", "torch", "tomlkit", "safetensors", "sqlite_utils"]
    code = f"import sys, organism; print([m for m in {heavy} if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROGRAM.parent)
    assert finished.stdout == "[]\n"


# Wrong requests: exit 2.


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        (["stauts"], "did you mean 'status'"), (["--nonsense"], "No such option.*--nonsense"), (["say"], "Missing argument"),
        (["say", ""], "nothing to say"), (["train"], "Missing option.*--corpus"), (["quarantine"], "Which command"),
        (["train", "--corpus", "x", "--steps", "3", "--seconds", "3"], "choose one"), (["train", "--corpus", "x", "--steps", "0"], "steps"),
        (["train", "--corpus", "x", "--stage", "giant"], "giant"), (["train", "--corpus", "x", "--field", "maybe"], "maybe"),
        (["train", "--corpus", "x", "--vocab", "100"], "vocab"), (["status", "--threads", "none"], "threads"),
        (["quarantine", "show", "x"], "'x'"),
    ],
)  # fmt: skip
def test_wrong_requests(arguments, pattern, tmp_path):
    command = (
        arguments
        if arguments in (["stauts"], ["--nonsense"], ["quarantine"])
        else [*arguments, "--home", str(tmp_path / "home")]
    )
    sentence(run(*command), 2, pattern)
    assert not (tmp_path / "home").exists()


def test_a_wrong_setting_is_named(tmp_path):
    (tmp_path / "organism.toml").write_text("[voice]\ntemprature = 1\n")
    sentence(run("say", "x", home=tmp_path), 2, "voice.temprature.*organism.toml.*voice.temperature")
    (tmp_path / "organism.toml").unlink()
    sentence(run("say", "x", home=tmp_path, ORGANISM_VOICE_TOP_K="many"), 2, "voice.top_k in the environment")


# Things that are not there: exit 1.


def test_nothing_lives_there(tmp_path):
    for command in ("status", "quarantine list", "backup x.tar.gz", f"eval {PROGRAM}"):
        sentence(run(*command.split(), home=tmp_path / "home"), 1, "Nothing lives in")
    assert not (tmp_path / "home").exists()


def test_files_that_cannot_be_read(born, tmp_path, corpus):
    (tmp_path / "empty.txt").touch()
    sentence(run("eval", tmp_path / "missing.txt", home=born), 1, "cannot be read: No such file")
    sentence(run("eval", tmp_path / "empty.txt", home=born), 1, "is empty")
    sentence(run("eval", tmp_path, home=born), 1, "cannot be read: Is a directory")
    sentence(run("train", "--corpus", tmp_path / "missing.txt", home=tmp_path / "home"), 1, "missing.txt")
    sentence(run("train", "--corpus", tmp_path / "empty.txt", home=tmp_path / "home"), 1, "is empty")


def test_a_traceback_for_who_wants_one(tmp_path):
    finished = run("status", home=tmp_path / "home", ORGANISM_RAISE="1")
    assert finished.returncode == 1 and "Traceback" in finished.stderr


# Speaking.


def test_one_answer(born):
    finished = run("say", "What is my sister called?", "--json", home=born)
    (answer,) = objects(finished.stdout)
    assert set(answer) == SAID and answer["text"] and answer["tokens"] > 0 and answer["seconds"] > 0
    assert finished.returncode == 0 and finished.stderr == ""
    plain = run("say", "Hello.", home=born)
    assert plain.stdout.strip() and "{" not in plain.stdout


def test_chat_over_a_pipe(tmp_path):
    finished = run(
        "chat", home=tmp_path / "home", stdin="Hello.\n\n/help\n/nonsense\n/status\n/why\n/quit\nnever read\n"
    )
    assert finished.returncode == 0
    assert "/learn FILE" in finished.stdout and "stage: embryo" in finished.stdout
    assert finished.stderr.startswith("Born in ") and "There is no command /nonsense" in finished.stderr
    with o.Memory(tmp_path / "home" / "memory.db") as memory:
        assert [m.text for m in memory.messages() if m.role == "user"] == ["Hello."]
    again = run(home=tmp_path / "home", stdin="Hello again.\n")  # no command: chat; the end of the input: saved
    assert again.returncode == 0 and again.stdout.strip() and again.stderr.startswith("Awake in ")


def test_chat_with_json_prints_one_object_a_line(tmp_path):
    finished = run(
        "--json", "--quiet", home=tmp_path / "home", stdin="Hello.\n\nGrüße! 你好\n/status\n/nonsense\nLast\n/quit\n"
    )
    lines = objects(finished.stdout)
    assert finished.returncode == 0 and finished.stderr == "" and len(lines) == 7
    assert [set(line) == SAID for line in lines] == [True, True, True, False, False, True, False]
    assert lines[3]["status"]["stage"] == "embryo" and "error" in lines[4]


def test_lines_that_are_not_text_or_too_long(tmp_path):
    child = start("--json", "--quiet", home=tmp_path / "home", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    raw = child.stdin.buffer
    raw.write(b"a" * 1_000_000 + b"\n\xff\xfe\0\nfine\n")
    child.stdin.close()
    lines = objects(child.stdout.read())
    assert child.wait(60) == 0 and len(lines) == 3
    assert "1,000,000" in lines[0]["error"].replace("1,000,001", "1,000,000") and set(lines[1]) == set(lines[2]) == SAID
    child.stdout.close()


def test_learning_a_file_in_chat(tmp_path, corpus):
    before = corpus.read_bytes()
    finished = run("chat", "--json", home=tmp_path / "home", stdin=f"/learn {corpus}\n/learn\n/learn /no/such/file\n")
    lines = objects(finished.stdout)
    assert (
        f"{len(before):,} bytes" in lines[0]["text"]
        and "Which file" in lines[1]["error"]
        and "/no/such/file" in lines[2]["error"]
    )
    assert corpus.read_bytes() == before


# Signals and pipes.


def awake(child):
    """Wait until the first line on stderr."""
    line = child.stderr.readline()
    assert line.startswith(("Born", "Awake")), line


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_save_and_leave(tmp_path, number, code):
    child = start("chat", home=tmp_path / "home", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    awake(child)
    child.stdin.write("My boat is named Silverfin.\n")
    child.stdin.flush()
    assert child.stdout.readline()
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in errors
    with o.Memory(tmp_path / "home" / "memory.db") as memory:
        assert [m.role for m in memory.messages()] == ["user", "organism"]
    assert o.Home(tmp_path / "home", read_only=True).latest() is not None


def test_training_is_saved_by_a_signal_and_goes_on(tmp_path, corpus):
    arguments = ["train", "--corpus", corpus, "--seconds", 300, "--batch", 4, "--json", "--seed", 1]
    child = start(*arguments, home=tmp_path / "home", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    steps = [json.loads(child.stdout.readline())["step"] for _ in range(5)]
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 143 and steps == [1, 2, 3, 4, 5]
    status = objects(run("status", "--json", home=tmp_path / "home").stdout)[0]
    assert status["step"] >= 5
    lines = objects(
        run("train", "--corpus", corpus, "--steps", 1, "--batch", 4, "--json", home=tmp_path / "home").stdout
    )
    assert lines[0]["step"] == status["step"] + 1


def test_a_closed_pipe_is_left_quietly(tmp_path, corpus):
    child = start("train", "--corpus", corpus, "--steps", 200, "--batch", 2, "--json", "--quiet", home=tmp_path / "home",
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(120) == 141
    child.stderr.close()
    assert run("status", home=tmp_path / "home").returncode == 0


def at_a_terminal(home, script):
    """Drive the program at a terminal by [(text to wait for, text to type or a function)]; (what it showed, exit code)."""
    pid, terminal = pty.fork()
    if pid == 0:
        heed_control_c()
        os.execve(sys.executable, [sys.executable, str(PROGRAM), "--home", str(home)], environment(TERM="xterm"))
    shown, position = "", 0

    def until(wanted, deadline):
        nonlocal shown
        while wanted is None or wanted not in shown[position:]:
            ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {wanted!r}, saw {shown!r}"
            try:
                data = os.read(terminal, 65536)
            except OSError as error:
                assert error.errno == errno.EIO
                data = b""
            if not data:
                return
            shown += data.decode("utf-8", "replace").replace("\r", "")

    for wanted, typed in script:
        until(wanted, time.monotonic() + 60)
        position = len(shown)
        if typed == "\x03":  # between the prompt and its waiting for a key, CPython's readline would miss the signal
            time.sleep(1)
        os.write(terminal, typed.encode())
    until(None, time.monotonic() + 60)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return shown, os.waitstatus_to_exitcode(status)


def test_a_conversation_at_a_terminal(tmp_path):
    shown, code = at_a_terminal(tmp_path / "home", [("> ", "Hello.\n"), ("> ", "/status\n"), ("generation", "/quit\n")])
    assert code == 0 and "Born in" in shown and "stage: embryo" in shown and "Saving" in shown and "\x1b[3" not in shown
    assert (tmp_path / "home" / "history").read_text().splitlines() == ["Hello.", "/status", "/quit"]
    shown, code = at_a_terminal(tmp_path / "home", [("> ", "\x04")])
    assert code == 0 and "Awake in" in shown


def test_control_c_at_the_prompt_leaves(tmp_path):
    shown, code = at_a_terminal(tmp_path / "home", [("> ", "\x03")])
    assert code == 130 and "Traceback" not in shown


# Training and measuring.


def test_training_reports_what_the_design_promises(tmp_path, corpus):
    finished = run("train", "--corpus", corpus, "--steps", 103, "--batch", 2, "--log-every", 2, "--eval", corpus, "--json", "--seed", 1,
                   home=tmp_path / "home")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    *steps, done = objects(finished.stdout)
    assert [line["step"] for line in steps] == [*range(1, 101), 102]
    assert all({"event", "step", "tokens", "loss", "bpb", "lr", "tokens_per_s", "stage"} <= set(line) for line in steps)
    assert {
        "event",
        "steps",
        "tokens",
        "seconds",
        "tokens_per_s",
        "wall_tokens_per_s",
        "loss",
        "stage",
        "n_params",
        "refused_bytes",
        "bpb_eval",
    } <= set(done)
    assert done["steps"] == 103 and done["event"] == "done" and 0 < done["bpb_eval"] < 8


def test_a_stage_is_for_the_newborn(tmp_path, corpus):
    first = run(
        "train", "--corpus", corpus, "--steps", 1, "--batch", 2, "--stage", "infant", "--json", home=tmp_path / "home"
    )
    assert objects(first.stdout)[-1]["stage"] == "infant", first.stderr
    sentence(
        run("train", "--corpus", corpus, "--steps", 1, "--stage", "child", home=tmp_path / "home"),
        2,
        "'infant', not 'child'",
    )


def test_evaluation_changes_nothing(born, corpus):
    before = {p: p.read_bytes() for p in born.rglob("*") if p.is_file() and p.suffix not in (".db-shm", ".db-wal")}
    frozen = objects(run("eval", corpus, "--json", home=born).stdout)[0]
    *points, prequential = objects(run("eval", corpus, "--prequential", "--curve", "--json", home=born).stdout)
    for result in (frozen, prequential):
        assert {"bytes", "tokens", "bits_per_byte", "perplexity", "seconds", "prequential"} <= set(result)
        assert result["bytes"] == corpus.stat().st_size and result["bits_per_byte"] > 0
    assert prequential["prequential"] is True and frozen["prequential"] is False
    assert prequential["bits_per_byte"] < frozen["bits_per_byte"]
    assert (
        points
        and {"event", "bytes", "bits_per_byte"} == set(points[0])
        and points[-1]["bytes"] == corpus.stat().st_size
    )
    assert {p: p.read_bytes() for p in before} == before


def test_a_blank_newborn_needs_no_home(tmp_path, corpus):
    finished = run("eval", corpus, "--prequential", "--blank", "--json", home=tmp_path / "home")
    (result,) = objects(finished.stdout)
    assert 0 < result["bits_per_byte"] < 8 and not (tmp_path / "home").exists()


# The home.


def test_status_says_who_it_is(born):
    (status,) = objects(run("status", "--json", home=born).stdout)
    promised = "id home stage n_params vocab corpus_bytes step generation loss syntropy gamma deltas immune mesh training_flops"
    assert set(promised.split()) <= set(status)
    assert set(status["gamma"]) >= {"magnitude", "sparsity"} and set(status["immune"]) == {
        "accepted",
        "delayed",
        "refused",
        "rolled_back",
    }
    assert "stage: embryo" in run("--home", born, "status").stdout


def test_a_home_in_use_can_be_read_but_not_lived_in(tmp_path):
    child = start("chat", home=tmp_path / "home", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    awake(child)
    sentence(run("say", "Hello.", home=tmp_path / "home"), 1, f"in use by process {child.pid}")
    assert run("status", home=tmp_path / "home").returncode == 0
    assert run("backup", tmp_path / "copy.tar.gz", home=tmp_path / "home").returncode == 0
    child.communicate("Still here.\n", timeout=60)
    assert child.returncode == 0


def test_a_backup_wakes_elsewhere(born, tmp_path):
    (made,) = objects(run("backup", tmp_path / "copy.tar.gz", "--json", home=born).stdout)
    assert made["bytes"] == (tmp_path / "copy.tar.gz").stat().st_size
    (tmp_path / "other").mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "copy.tar.gz", "-C", tmp_path / "other"], check=True)
    one, other = (objects(run("status", "--json", home=h).stdout)[0] for h in (born, tmp_path / "other"))
    assert one["id"] == other["id"] and one["messages"] == other["messages"] > 0
    sentence(run("backup", tmp_path / "copy.tar.gz", home=born), 1, "exists already")


def test_a_newer_home_is_refused_and_an_older_generation_is_used(tmp_path, corpus):
    home = tmp_path / "home"
    assert run("train", "--corpus", corpus, "--steps", 1, "--batch", 2, home=home).returncode == 0
    newest = o.Home(home, read_only=True).latest()
    (newest.path / "body.safetensors").write_bytes(b"")
    finished = run("say", "Hello.", home=home)
    assert finished.returncode == 0 and finished.stdout.strip() and "is set aside as damaged-" in finished.stderr
    generation = o.Home(home, read_only=True).latest()
    state = generation.state | dict(format=99)
    (generation.path / "state.json").write_text(json.dumps(state))
    sums = {name: o._file_digest(generation.path / name) for name in o._read_sums(generation.path)}
    (generation.path / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    sentence(run("say", "Hello.", home=home), 1, "newer than")


def test_a_damaged_memory_is_named(tmp_path):
    home = tmp_path / "home"
    assert run("say", "Hello.", home=home).returncode == 0
    for file in home.glob("memory.db*"):
        file.write_bytes(b"x" * 4096)
    sentence(run("say", "Hello.", home=home), 1, "memory.db is damaged")
    finished = run("doctor", home=home)
    assert finished.returncode == 1 and "bad   memory" in finished.stdout


def test_the_quarantine(born, tmp_path):
    subprocess.run(["cp", "-r", born, tmp_path / "home"], check=True)
    with o.Memory(tmp_path / "home" / "memory.db") as memory:
        memory.quarantine_add(
            "spam.txt", b"buy buy \xff buy", o.Verdict("refuse", "repetition", "one word, three times")
        )
    (listed,) = objects(run("quarantine", "list", "--json", home=tmp_path / "home").stdout)
    assert (listed["source"], listed["decision"], listed["rule"], listed["bytes"]) == (
        "spam.txt",
        "refuse",
        "repetition",
        13,
    )
    assert "spam.txt" in run("quarantine", "list", home=tmp_path / "home").stdout
    (shown,) = objects(run("quarantine", "show", listed["id"], "--json", home=tmp_path / "home").stdout)
    assert shown["text"] == "buy buy \ufffd buy"
    sentence(run("quarantine", "show", 99, home=tmp_path / "home"), 1, "no number 99")
    assert "Nothing was refused" in run("quarantine", "list", home=born).stderr


def test_the_doctor(born, tmp_path):
    found = objects(run("doctor", "--json", home=born).stdout)
    states = {finding["check"]: finding["state"] for finding in found}
    assert {"python", "numpy", "sqlite", "kernels", "disk", "home", "generation", "memory", "torch"} <= set(states)
    assert states["generation"] == states["memory"] == states["home"] == "ok"
    assert run("doctor", home=tmp_path / "nowhere").returncode == 0 and not (tmp_path / "nowhere").exists()


@pytest.fixture
def open_folder():
    """A temporary folder that others may enter; pytest closes its own to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_read_only_home(born, open_folder):
    subprocess.run(["cp", "-r", born, open_folder / "home"], check=True)
    subprocess.run(["chmod", "-R", "a+rX,a-w", open_folder / "home"], check=True)
    # As root first, in a home of its own: another user may not be allowed to read this Python's library.
    code = (
        "import os, sys, organism as o; from numba import njit; arguments = sys.argv; here = arguments.pop(); "
        "o.main(['say', 'Hello.', '--home', here]); o.main(['quarantine', 'list', '--home', here]); "
        "sys.stdout.flush(); os.setuid(65534); sys.exit(o.main(arguments[1:]))"
    )

    def as_nobody(*arguments):
        mine = ["--home", str(open_folder / "home"), str(open_folder / "other")]
        return subprocess.run([sys.executable, "-c", code, *arguments, *mine], capture_output=True, text=True,
                              cwd=PROGRAM.parent, env=environment(HOME=str(open_folder), NUMBA_CACHE_DIR=str(open_folder)))  # fmt: skip

    sentence(as_nobody("say", "Hello."), 1, "cannot be written")
    assert as_nobody("quarantine", "list").returncode == 0
