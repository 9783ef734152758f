"""The bridge: a giant that answers with what the organism remembers, is read along with, asked once, and distilled.

Run alone: pytest -n 0 tests/giant/test_bridge.py
"""

from __future__ import annotations

import json

import pytest

import organism as o
from organs.giant import bridge

from .small import write_llama


@pytest.fixture(scope="module")
def advisor(tmp_path_factory):
    advisor = bridge.teacher(
        f"gguf:{write_llama(tmp_path_factory.mktemp('bridge') / 'small.gguf', context=1024)}", threads=1
    )
    # The small model repeats a line break for ever, unless it may choose widely.
    advisor.sampling |= dict(seed=1, max_tokens=12, temperature=3.0, top_p=1.0, top_k=0, min_p=0.0)
    yield advisor
    advisor.close()


@pytest.fixture
def life(tmp_path):
    with o.Organism(tmp_path / "home", seed=0) as life:
        yield life


# --- Who is asked. ---


@pytest.mark.parametrize(
    "spec, said", [("nonsense", "gguf:PATH"), ("gguf:", "gguf:PATH"), ("openai:gpt", "arrive with TEACH")]
)
def test_a_teacher_that_is_not_understood_is_named(spec, said):
    with pytest.raises(o.UsageError, match=said):
        bridge.teacher(spec)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(o.OrganismError, match="no model file"):
        bridge.advisor(str(tmp_path / "nothing.gguf"))


def test_the_environment_says_where_it_is_and_how_it_speaks(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    for key, value in dict(
        DEVICE="torch", OFFLOAD="layers=1", VRAM="2.5", CONTEXT="200", KV_CACHE="q8", TEMPERATURE="0.9"
    ).items():
        monkeypatch.setenv(f"ORGANISM_GIANT_{key}", value)
    advisor = bridge.advisor(str(write_llama(tmp_path / "small.gguf", context=1024)), threads=1)
    giant = advisor.giant
    assert (giant.accelerator.kind, giant.accelerator.budget, giant._runner.placed.layers) == (
        "torch",
        2_500_000_000,
        1,
    )
    assert giant.context == 200 and giant._runner.placed.cpu.kinds == ("q8", "q8")
    assert advisor.sampling["temperature"] == 0.9
    advisor.close()


@pytest.mark.parametrize("command", [
    ["chat", "--giant"], ["say", "Hello.", "--giant"], ["consult", "Why?", "--teacher"], ["distill", "--teacher"],
    ["giant", "generate"], ["giant", "plan"],
], ids=" ".join)  # fmt: skip
def test_every_command_that_takes_a_giant_reads_the_environment(command, small_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ORGANISM_GIANT_DEVICE", "tpu")
    model = f"gguf:{small_llama}" if "--teacher" in command else str(small_llama)
    more = ["Hello."] if "generate" in command else []
    assert o.main([*command, model, *more, "--home", str(tmp_path / "home")]) == 2
    assert "device is 'tpu'; it can be auto, cpu, cuda, mps" in capsys.readouterr().err


# --- What the organism lends. ---


def test_what_the_user_told_is_recalled_and_questions_are_not(life):
    for text in ("My dog is called Pirol.", "What is a dog?", "The weather is fine."):
        life.memory.add_message("user", text)
    assert bridge.recall(life.memory, "What is my dog called?")[0] == ("told", "My dog is called Pirol.")
    assert all("?" not in sentence for _, sentence in bridge.recall(life.memory, "What is my dog called?"))


def test_turns_are_those_that_the_giant_answered(life):
    memory = life.memory
    memory.add_message("user", "Hello.")
    memory.add_message("organism", "babble")
    memory.add_message("user", "Name a river.")
    memory.add_message("organism", "The Danube.", "giant")
    before = memory.add_message("user", "Another?")
    assert bridge.last_turns(memory, before, 10) == [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Danube."},
    ]


def test_it_whispers_the_words_that_the_question_lacks(advisor):
    bias = advisor._whispered([("told", "My dog is called Pirol."), ("read", "Dogs bark.")], "What is my dog called?")
    giant = advisor.giant
    assert set(bias) == set(giant.tokenize(" Pirol")) and set(bias.values()) == {bridge.WHISPER}


def test_a_prompt_holds_what_is_remembered_and_never_more_than_the_context(advisor, life):
    turns = [dict(role=role, content="word " * 200) for role in ("user", "assistant") * 5]
    generation = advisor._asked([("read", "Herons eat fish.")], turns, "What do herons eat?")
    prompt = advisor.giant.detokenize(generation.prompt, special=True)
    assert "- Herons eat fish." in prompt and prompt.count("word ") < 2000
    assert len(generation.prompt) < advisor.giant.context


# --- Answering in its place. ---


def test_the_giants_answer_streams_is_remembered_and_is_learned(advisor, life):
    life.giant = advisor
    pieces: list[str] = []
    reply = life.say("My boat is named Seldom.", pieces.append)
    assert "".join(pieces).strip() == reply.text.strip() != "" and reply.source == "giant" and reply.tokens > 0
    question, answer = life.memory.messages(limit=2)
    assert (question.text, answer.source, answer.text) == ("My boat is named Seldom.", "giant", reply.text.strip())
    waiting = {row.source for row in life.memory.pending()}
    assert waiting == {"chat", "giant"}
    assert life.say("What is my boat named?").remembered == ("My boat is named Seldom.",)


# --- Asking once, and distilling. ---


def test_distilling_lives_what_the_giant_writes_and_tells_each_verdict(advisor, life):
    events: list[dict] = []
    done = bridge.distill(life, advisor, 1.0, events.append, seed=0)
    assert done["event"] == "done" and events and all(e["event"] == "lesson" and e["decision"] for e in events)
    accepted = [e for e in events if e["decision"] == "accept"]
    assert done["texts"] == len(accepted) and done["bytes"] == sum(e["bytes"] for e in accepted)
    lived = {row.source for row in life.memory.lived()}
    assert ("gguf:" in " ".join(lived)) == bool(accepted)


def test_topics_begin_with_what_the_user_said_last(life):
    import random

    for text in ("I like herons.", "I like boats."):
        life.memory.add_message("user", text)
    stream = bridge.topics(life, random.Random(0))
    assert [next(stream)[0] for _ in range(2)] == ["I like boats.", "I like herons."]


def test_consult_asks_once_and_lives_the_answer(tmp_path, capsys):
    model = write_llama(tmp_path / "small.gguf", context=512)
    home = str(tmp_path / "home")
    assert o.main(["consult", "Why is the sky blue?", "--teacher", f"gguf:{model}", "--home", home, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(told["text"], str) and told
    with o.Organism(home) as life:
        question, answer = life.memory.messages(limit=2)
        assert (question.role, answer.source) == ("user", "giant") and not life.memory.pending()
