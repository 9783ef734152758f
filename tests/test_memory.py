"""memory.db: nothing acknowledged is lost, everything is found again, every trouble is one sentence.   pytest tests/test_memory.py"""

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import organism as o

ACCEPT = o.Verdict("accept")
REFUSE = o.Verdict("refuse", "noise", "it repeats itself")


@pytest.fixture
def memory(tmp_path):
    with o.Memory(tmp_path / "memory.db") as opened:
        yield opened


def texts(found):
    return [f.text for f in found]


# Conversations.


def test_messages_come_back_in_order_and_by_window(memory):
    ids = [memory.add_message("user" if n % 2 == 0 else "organism", f"line {n}") for n in range(10)]
    assert [m.text for m in memory.messages()] == [f"line {n}" for n in range(10)]
    assert [m.id for m in memory.messages(limit=3)] == ids[-3:]
    assert [m.id for m in memory.messages(limit=2, before=ids[5])] == ids[3:5]
    assert [m.id for m in memory.messages(after=ids[7])] == ids[8:]
    first = memory.messages()[0]
    assert first.role == "user" and first.source == "chat" and first.ts > 1e9


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_is_remembered_and_searched_without_harm(memory, text):
    ref = memory.add_message("user", text)
    data = text.encode("utf-8", "surrogatepass")
    assert memory.messages(after=ref - 1)[0].text == data.decode("utf-8", "replace")
    for found in memory.search(text, limit=3):
        assert found.text and 0 < found.score <= 1


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary())
def test_any_bytes_are_lived_as_they_are(memory, data):
    seq = memory.add_lived([("file", data, 0)], burst_id=1)
    assert [row.text for row in memory.lived(after_seq=seq - 1)] == [data]


def test_broken_bytes_are_a_blob_and_text_is_text(memory):
    memory.add_lived([("a", "grün", 0), ("b", b"gr\xfcn", 0), ("c", b"a\0b", 1)], 1)
    kinds = [kind for (kind,) in memory._all("SELECT typeof(text) FROM lived ORDER BY seq")]
    assert kinds == ["text", "blob", "blob"]
    assert [row.text for row in memory.lived()] == ["grün".encode(), b"gr\xfcn", b"a\0b"]


def test_a_message_and_what_it_teaches_are_one_transaction(memory):
    memory.add_message("user", "I sing.", learn="H: I sing.\n")
    assert [p.text for p in memory.pending()] == [b"H: I sing.\n"]


# Durability.


def test_what_was_acknowledged_survives_kill_nine(tmp_path):
    code = """if True:
        import sys, itertools, organism as o
        memory = o.Memory(sys.argv[1])
        for n in itertools.count():
            memory.add_message("user", f"message {n}")
            memory.queue("chat", f"H: message {n}")
            print(n, flush=True)"""
    for kill in range(4):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "memory.db")], stdout=subprocess.PIPE, text=True,
                                 cwd=Path(o.__file__).parent)  # fmt: skip
        for _ in range(5 + 7 * kill):
            last = int(child.stdout.readline())
        child.kill()
        child.wait()
        child.stdout.close()
        with o.Memory(tmp_path / "memory.db") as memory:
            stored = {m.text for m in memory.messages()}
            assert {f"message {n}" for n in range(last + 1)} <= stored
            assert memory.check() == []


def test_messages_are_synchronous_and_statistics_are_not(memory):
    memory.growth(step=1, note="x")
    assert memory._writer.execute("PRAGMA synchronous").fetchone() == (1,)  # NORMAL
    memory.add_message("user", "hello")
    assert memory._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert memory._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_failed_transaction_changes_nothing(memory):
    ref = memory.queue("file", "a")
    with pytest.raises(AttributeError):
        memory.settle([ref], [("file", "a", 0)], [("file", "b", None)])
    assert len(memory.pending()) == 1 and memory.lived_bytes() == 0
    memory.settle([ref], [("file", "a", 0)], [("file", "b", REFUSE)], burst_id=7)
    assert memory.pending() == [] and memory.lived_bytes() == 1
    assert [(q.text, q.rule) for q in memory.quarantine()] == [(b"b", "noise")]


def test_threads_may_write_and_read_at_once(memory):
    problems = []

    def work(me):
        try:
            for n in range(25):
                memory.add_message("user", f"worker {me} says {n}")
                memory.event("tick", dict(n=n))
                assert memory.search(f"worker {me}", limit=2)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and len(memory.messages()) == 100


# What was lived.


def test_lived_rows_keep_their_order_and_numbers_are_never_reused(memory):
    assert memory.last_seq() == 0
    last = memory.add_lived([("a", f"row {n}", int(n > 0)) for n in range(100)], 1)
    assert [row.seq for row in memory.lived()] == list(range(1, 101)) and last == 100
    assert [row.part for row in memory.lived(after_seq=98)] == [1, 1]
    gone = memory.evict(100, up_to_seq=95)
    assert gone and memory.lived_bytes() <= 100 + 8
    assert memory.last_seq() == 100
    assert memory.add_lived([("b", "new", 0)], 2) == 101


def test_eviction_never_passes_the_checkpoint(memory):
    memory.add_lived([("a", "x" * 100, 0)] * 10, 1)
    assert memory.evict(0, up_to_seq=4) == 4
    assert [row.seq for row in memory.lived()] == [5, 6, 7, 8, 9, 10]
    assert memory.evict(10_000, up_to_seq=10) == 0


def test_what_was_evicted_is_no_longer_found(memory):
    memory.add_lived([("a", "The glimmerfish sleeps.", 0), ("a", "The heron wakes.", 0)], 1)
    assert texts(memory.search("glimmerfish")) == ["The glimmerfish sleeps."]
    memory.evict(20, up_to_seq=1)
    assert memory.search("glimmerfish") == [] and texts(memory.search("heron")) == ["The heron wakes."]
    memory._writer.execute(
        "INSERT INTO words(words, rank) VALUES ('integrity-check', 1)"
    )  # raises where the index differs


def test_an_interrupted_index_is_finished_by_the_next_text(memory, monkeypatch):
    monkeypatch.setattr(o.Memory, "_index_lived", lambda self: None)
    memory.add_lived([("a", "The glimmerfish sleeps.", 0)], 1)
    assert memory.search("glimmerfish") == []
    monkeypatch.undo()
    memory.add_lived([("a", "Rain.", 0)], 1)
    assert texts(memory.search("glimmerfish")) == ["The glimmerfish sleeps."]


# Search.

FACTS = """My sister is called Marbeth.
My dog Pello loves to swim in the lake.
I work as a carpenter in Ulm.
I was born in 1984 in a small village.
My favourite colour is turquoise.
My neighbour plays the trombone every evening.
I bought a red bicycle last week.
Meine Schwester wohnt in Hamburg.
Моя собака любит рыбу.
我的姐姐叫玛尔贝。
We went to Portugal with the children in May.
My boat is named Silverfin; it has two masts.
My mother bakes plum cake on Sundays.
I am allergic to hazelnuts.
Our cats are called Mim and Tock.""".split("\n")


@pytest.mark.parametrize(
    "question, answer",
    [
        ("What is my sister called?", 0), ("what's my sister's name", 0), ("Who is Marbet?", 0), ("Which lake animal is Pello?", 1),
        ("Does my dog swim?", 1), ("Where am I working?", 2), ("When was I born?", 3), ("Which colour is my favorite colour?", 4),
        ("Who plays trombone?", 5), ("What did I buy?", 6), ("How old is the bycicle?", 6), ("Wo wohnt meine Schwester?", 7),
        ("Где моя собака, что она любит?", 8), ("姐姐叫什么", 9), ("Did my kids go to Portugal?", 10),
        ("How many masts does Silverfn have?", 11), ("What does my mother bake?", 12), ("What am I allergic to, hazelnut?", 13),
        ("What is my cat called?", 14),
        ("МОЯ СОБАКА", 8), ("SISTER", 0),
    ],
)  # fmt: skip
def test_a_fact_is_found_when_it_is_asked_for_in_other_words(memory, question, answer):
    for fact in FACTS:
        memory.add_message("user", fact)
        memory.add_message("organism", "I see.")
    asked = memory.add_message("user", question)
    assert memory.search(question, before=asked)[0].text == FACTS[answer]


def test_a_question_does_not_outrank_the_fact(memory):
    memory.add_message("user", "My sister is called Marbeth.")
    for question in ("What is my sister called?", "what is my sister called", "Is my sister called so?"):
        memory.add_message("user", question)
    found = memory.search("What is my sister called?")
    assert found[0].text == "My sister is called Marbeth." and found[0].score > 2 * found[1].score


def test_the_asking_message_itself_is_left_out(memory):
    asked = memory.add_message("user", "The glimmerfish sleeps.")
    assert memory.search("glimmerfish", before=asked) == []


def test_the_newest_wins_ties_and_nothing_is_found_twice(memory):
    for text in ("My age is 30.", "My age is 31.", "My age is 31.", "my  age is 31."):
        memory.add_message("user", text)
    found = texts(memory.search("What is my age?"))
    assert found == ["my  age is 31.", "My age is 30."]


def test_only_the_sentence_that_matches_comes_back(memory):
    memory.add_message(
        "user", "I had a long day. My sister is called Marbeth. Tomorrow I shall sleep, e.g. until noon!"
    )
    assert texts(memory.search("my sister")) == ["My sister is called Marbeth."]
    page = (
        "It was late, and the road that led from the harbour to the old mill was\nwet with rain. "
        + "Nothing stirred. " * 900
    )
    memory.add_lived([("book.txt", page + "The glimmerfish of Tarvenholm eats silver moss.\n", 0)], 1)
    assert texts(memory.search("What does the glimmerfish eat?")) == ["The glimmerfish of Tarvenholm eats silver moss."]
    assert texts(memory.search("harbour mill")) == [
        "It was late, and the road that led from the harbour to the old mill was wet with rain."
    ]


def test_a_line_of_dialogue_brings_the_line_that_answered_it(memory):
    memory.add_lived([("a.txt", "H: What is a heron?\nA: A grey bird that waits.\n\nH: Thanks.\n", 0)], 1)
    best = memory.search("heron")[0]
    assert (best.text, best.answer, best.kind, best.source) == (
        "H: What is a heron?",
        "A grey bird that waits.",
        "lived",
        "a.txt",
    )


def test_what_was_said_comes_before_what_was_read(memory):
    memory.add_message("user", "The heron is grey.")
    memory.add_lived([("a.txt", "The heron is white.", 0)], 1)
    assert [f.kind for f in memory.search("heron")] == ["message", "lived"]


def test_chat_that_was_lived_is_found_once(memory):
    memory.add_message("user", "The heron is grey.")
    memory.add_lived([("chat", "H: The heron is grey.\n", 1)], 1)
    assert texts(memory.search("heron")) == ["The heron is grey."]


@pytest.mark.parametrize(
    "text",
    ["", "?", "what is it", "\"'*()^:- NEAR AND OR NOT", '"; DROP TABLE messages; --', "a" * 100_000, "\0", "text:*"],
)
def test_odd_questions_are_harmless(memory, text):
    memory.add_message("user", "Hello there.")
    assert isinstance(memory.search(text), list)
    assert len(memory.messages()) == 1


def test_common_words_do_not_drown_rare_ones(memory):
    rows = "".join(f"The tower number {n} is high.\n" for n in range(3000))
    memory.add_lived([("towers.txt", rows, 0)], 1)
    memory.add_message("user", "The tower of Tarvenholm is crooked.")
    assert memory.search("the tower of Tarvenholm")[0].text == "The tower of Tarvenholm is crooked."
    assert memory.search("tower")[0].text == "The tower of Tarvenholm is crooked."


@pytest.mark.parametrize(
    "forms",
    ["sister sisters sister's", "running run runs ran", "buy bought buys", "house houses", "Häuser häusern", "собака собаку собаки",
     "city cities", "swim swims swimming swam", "called call name names", "child children kids"],
)  # fmt: skip
def test_forms_of_a_word_share_a_stem(forms):
    assert len({o.word_stem(word) for word in forms.split()}) == 1, [o.word_stem(word) for word in forms.split()]


def test_questions_are_told_from_statements():
    assert all(
        map(o.is_question, ["Who?", "what is my name", "Wo ist sie", "где дом", "Really?", "是吗？", "do you know her"])
    )
    assert not any(map(o.is_question, ["My name is Ada.", "What a day!", "Who knows.", "I know what you mean", ""]))


def test_sentences_are_cut_where_they_end():
    assert o.sentences("One. Two! Three?\nFour… «Five.» Six") == ["One.", "Two!", "Three?", "Four…", "«Five.»", "Six"]
    assert o.sentences("Dr. Weber met Mrs. Holm. They talked.") == ["Dr. Weber met Mrs. Holm.", "They talked."]
    assert o.sentences("你好。我说：「好。」走吧！") == ["你好。", "我说：「好。」", "走吧！"]
    assert max(map(len, o.sentences("word " * 1000))) <= 400
    assert "".join(o.sentences("x" * 1000)) == "x" * 1000


# Tables that others read.


def test_statistics_take_numpy_numbers(memory):
    memory.growth(step=np.int64(3), vocab_size=387, n_params=10, n_deltas=0, corpus_chars=5, loss=np.float32(0.5), gamma_sparsity=1.0,
                  gamma_magnitude=0.0, note="burst")  # fmt: skip
    memory.syntropy(entropy_before=1.0, entropy_after=0.5, syntropy_delta=0.5, action_taken="steady")
    memory.event("reply", dict(bits=np.float32(1.5), list=np.arange(2)))
    memory.event("other")
    assert memory._all("SELECT step, loss, note FROM growth") == [(3, 0.5, "burst")]
    assert memory.events("reply", limit=1)[0].data == {"bits": 1.5, "list": [0, 1]}
    assert [e.kind for e in memory.events()] == ["other", "reply"]
    assert memory.counts() == dict(messages=0, pending=0, lived=0, quarantine=0, growth=1, syntropy_log=1, events=2)


def test_the_documented_columns_are_there(memory):
    documented = {
        "messages": "id ts role text source", "lived": "seq ts source text weight burst_id",
        "quarantine": "id ts source text decision rule reason",
        "growth": "id ts step vocab_size n_params n_deltas corpus_chars loss gamma_sparsity gamma_magnitude note",
        "syntropy_log": "id ts entropy_before entropy_after syntropy_delta field_deviation purpose_magnitude "
        "purpose_alignment action_taken note",
        "events": "id ts kind data",
    }  # fmt: skip
    for table, columns in documented.items():
        there = {row[1] for row in memory._all(f"PRAGMA table_info({table})")}
        assert set(columns.split()) <= there, table


def test_the_quarantine_keeps_text_and_reason(memory):
    ref = memory.quarantine_add("spam.txt", b"\xffbuy\0", REFUSE)
    row = memory.quarantine_get(ref)
    assert (row.source, row.text, row.decision, row.rule, row.reason) == (
        "spam.txt",
        b"\xffbuy\0",
        "refuse",
        "noise",
        "it repeats itself",
    )
    assert memory.quarantine_get(ref + 1) is None


# Troubles, each in one sentence.


def fails(pattern, call, *arguments, **options):
    with pytest.raises(o.OrganismError, match=pattern) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


def test_a_newer_memory_is_refused(tmp_path):
    o.Memory(tmp_path / "memory.db").close()
    with sqlite3.connect(tmp_path / "memory.db") as connection:
        connection.execute("INSERT INTO _migrations VALUES ('m999_dreams', 0)")
    connection.close()
    for read_only in (False, True):
        fails("newer organism .m999_dreams", o.Memory, tmp_path / "memory.db", read_only=read_only)


def test_migrations_are_applied_once_and_in_order(tmp_path, monkeypatch):
    o.Memory(tmp_path / "memory.db").close()
    more = [("m003_moods", "CREATE TABLE moods(id INTEGER)"), ("m004_more", "ALTER TABLE moods ADD COLUMN name TEXT")]
    monkeypatch.setattr(o, "MEMORY_MIGRATIONS", o.MEMORY_MIGRATIONS + more)
    fails("older organism", o.Memory, tmp_path / "memory.db", read_only=True)
    for _ in range(2):
        with o.Memory(tmp_path / "memory.db") as memory:
            assert [r[1] for r in memory._all("PRAGMA table_info(moods)")] == ["id", "name"]
            assert [n for (n,) in memory._all("SELECT name FROM _migrations ORDER BY name")] == [
                "m001_born",
                "m002_immune",
                "m003_moods",
                "m004_more",
            ]


def test_a_broken_migration_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(
        o, "MEMORY_MIGRATIONS", o.MEMORY_MIGRATIONS + [("m002_bad", "CREATE TABLE half(id INTEGER); CREATE NONSENSE")]
    )
    fails("cannot be used", o.Memory, tmp_path / "memory.db")
    monkeypatch.undo()
    with o.Memory(tmp_path / "memory.db") as memory:
        assert memory._all("SELECT name FROM sqlite_master WHERE name = 'half'") == []


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "memory.db"
    path.write_bytes(b"This is not a database. " * 100)
    fails("memory.db is damaged", o.Memory, path)
    assert path.read_bytes().startswith(b"This is not")


def test_another_program_s_database_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "memory.db") as connection:
        connection.execute("CREATE TABLE photos(id INTEGER)")
    connection.close()
    fails("not the memory of an organism", o.Memory, tmp_path / "memory.db")


def test_a_full_disk_is_one_sentence_and_loses_nothing(memory):
    memory.add_message("user", "before")
    pages = memory._writer.execute("PRAGMA page_count").fetchone()[0]
    memory._writer.execute(f"PRAGMA max_page_count = {pages + 4}")
    fails("disk .* is full", memory.add_message, "user", "x" * 1_000_000)
    fails("disk .* is full", memory.add_lived, [("a", "y" * 1_000_000, 0)], 1)
    memory._writer.execute("PRAGMA max_page_count = 1000000")
    memory.add_message("user", "after")
    assert [m.text for m in memory.messages()] == ["before", "after"]


def test_a_database_that_another_process_holds(tmp_path):
    with o.Memory(tmp_path / "memory.db", config=o.MemoryConfig(busy_seconds=0.05)) as memory:
        other = sqlite3.connect(tmp_path / "memory.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        fails("another process", memory.add_message, "user", "hello")
        other.close()
        memory.add_message("user", "hello")


def test_a_read_only_memory_reads_and_never_writes(tmp_path):
    fails("nothing has lived there", o.Memory, tmp_path / "memory.db", read_only=True)
    assert not (tmp_path / "memory.db").exists()
    with o.Memory(tmp_path / "memory.db") as writer:
        writer.add_message("user", "The heron is grey.")
        with o.Memory(tmp_path / "memory.db", read_only=True) as reader:
            assert reader.search("heron") and len(reader.messages()) == 1
            fails("reading only", reader.add_message, "user", "x")
            writer.add_message("user", "The heron is white.")
            assert len(reader.messages()) == 2


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to become somebody who may not write")
@pytest.mark.parametrize("read_only", [True, False])
def test_a_folder_that_may_not_be_written(tmp_path, read_only):
    with o.Memory(tmp_path / "memory.db") as memory:
        memory.add_message("user", "The heron is grey.")
    tmp_path.chmod(0o555)
    (tmp_path / "memory.db").chmod(0o444)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and len(parent.parts) > 2:
            parent.chmod(0o755)
    code = f"""if True:
        import os, sys, organism as o
        os.setuid(65534)
        try:
            print(len(o.Memory(sys.argv[1], read_only={read_only}).search("heron")))
        except o.OrganismError as error:
            print(error)"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "memory.db")],
        capture_output=True,
        text=True,
        cwd=Path(o.__file__).parent,
    )
    tmp_path.chmod(0o755)
    assert run.stdout.strip() == "1" if read_only else "read-only" in run.stdout, run


def test_a_copy_is_whole_while_others_write(memory, tmp_path):
    memory.add_message("user", "The heron is grey.")
    memory.copy_to(tmp_path / "copy.db")
    memory.add_message("user", "Later.")
    with o.Memory(tmp_path / "copy.db") as copy:
        assert [m.text for m in copy.messages()] == ["The heron is grey."] and copy.check() == []


def test_closing_twice_is_fine_and_using_it_afterwards_is_said(memory):
    memory.close()
    memory.close()
    fails("is closed", memory.add_message, "user", "x")
