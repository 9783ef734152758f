"""The giant in words: prompts, streams, stops, cancelling, several prompts, conversations, bad input.

Run alone: pytest -n 0 tests/giant/test_text.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from organism import UsageError
from organs.giant import ContextFull, Giant
from organs.giant.text import PREFILL

from .small import byte_level, write_llama

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = dict(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def giant(small_llama):
    giant = Giant.load(small_llama, kv_cache="f32")
    yield giant
    giant.close()


# --- Prompts. ---


def test_tokenize_adds_no_bos_and_comes_back(giant):
    ids = giant.tokenize("def f(x): é")
    assert giant.detokenize(ids) == "def f(x): é" and giant.tokenizer.bos not in ids


def test_messages_go_through_the_template_and_a_text_does_not(giant):
    assert (
        giant.detokenize(giant.prompt(HELLO), special=True)
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert giant.prompt("hello") == giant.tokenize("hello")


# --- Generating. ---


def test_greedy_text_is_the_engines_greedy_tokens(giant):
    answer = giant.generate("def ", **GREEDY)
    expected = list(giant.generate_ids(giant.tokenize("def "), 12, stop=giant.tokenizer.ends))
    assert answer.text == giant.detokenize(expected) and answer.tokens == expected
    assert answer.prompt_tokens == len(giant.tokenize("def ")) and answer.finish_reason in ("stop", "length")


def test_the_stream_is_the_text_in_whole_characters(giant):
    answer = giant.generate(HELLO, seed=3, temperature=1.5, max_tokens=60)
    pieces = list(answer)
    assert "".join(pieces) == answer.text and all(pieces)
    data = giant.tokenizer.detokenize(answer.tokens)
    assert answer.text == data.decode("utf-8", "replace")


def test_the_same_seed_gives_the_same_text(giant):
    wide = dict(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=20)  # cuts come before temperature
    texts = [giant.generate(HELLO, seed=seed, **wide).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(giant):
    whole = giant.generate("def ", **GREEDY | dict(max_tokens=30)).text
    assert len(whole) > 8
    stop = whole[4:7]
    answer = giant.generate("def ", stop=stop, **GREEDY | dict(max_tokens=30))
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"


def test_max_tokens_and_the_context_end_it_with_length(giant):
    answer = giant.generate(
        "def ", temperature=1.0, seed=0, max_tokens=3, logit_bias={t: -math.inf for t in giant.tokenizer.ends}
    )
    assert len(answer.text) and len(answer.tokens) == 3 and answer.finish_reason == "length"
    assert giant.generate("def ", max_tokens=0).text == ""
    near = giant.tokenize("x") * (giant.context - 4)
    full = giant.generate(giant.detokenize(near), seed=0, logit_bias={t: -math.inf for t in giant.tokenizer.ends})
    assert full.text and full.finish_reason == "length" and full.prompt_tokens + len(full.tokens) == giant.context + 1


def test_cancelling_stops_within_a_token_and_within_a_prompt(giant):
    answer = giant.generate("def ", temperature=1.0, seed=0, logit_bias={t: -math.inf for t in giant.tokenizer.ends})
    for count, _ in enumerate(answer):
        if count == 3:
            answer.cancel()
            done = len(answer.tokens)
    assert answer.finish_reason == "cancelled" and len(answer.tokens) <= done + 1
    early = giant.generate("def ")
    early.cancel()
    assert early.text == "" and early.tokens == [] and early.finish_reason == "cancelled"


def test_leaving_the_stream_early_is_fine(giant):
    for _ in giant.generate("def ", seed=1):
        break
    assert giant.generate("def ", **GREEDY).text == giant.generate("def ", **GREEDY).text


def test_log_probabilities_come_with_every_token(giant):
    answer = giant.generate("def ", top_logprobs=3, **GREEDY)
    assert answer.text and len(answer.logprobs) == len(answer.tokens)
    logits = giant.logits(giant.tokenize("def "))[-1].astype(float)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    chosen, top = answer.logprobs[0]
    assert chosen.token == top[0].token == int(logits.argmax()) and len(top) == 3
    assert chosen.logprob == pytest.approx(expected.max(), abs=2e-2)


def test_several_prompts_are_answered_together(giant):
    prompts = ["def ", "import numpy", HELLO, "x"]
    together = giant.generate_all(prompts, **GREEDY)
    alone = [giant.generate(prompt, **GREEDY) for prompt in prompts]
    assert [run.finish_reason for run in together] == [
        run.finish_reason or run.text and run.finish_reason for run in alone
    ]
    same = sum(a.tokens[:4] == b.tokens[:4] for a, b in zip(together, alone))
    assert same >= 3, "rounding may tip a token now and then"


def test_json_that_is_asked_for_is_json(giant):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "boolean"}},
              "required": ["a", "b"]}  # fmt: skip
    for seed in range(3):
        answer = giant.generate(HELLO, json_schema=schema, seed=seed, temperature=1.0, max_tokens=80)
        data = json.loads(answer.text)
        assert set(data) == {"a", "b"} and data["a"] in range(10) and answer.finish_reason == "stop"
    answer = giant.generate("x", grammar='root ::= ("yes" | "no") "!"', seed=4)
    assert answer.text in ("yes!", "no!")


def test_embeddings_have_length_one_and_know_alike_from_unlike(giant):
    a, b, c = (giant.embed(text) for text in ("def f(x)", "def f(y)", "é本é本"))
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5) and a @ b > a @ c


def test_the_score_of_a_text_is_its_mean_negative_log_likelihood(giant):
    tokens = (giant.tokenize("def write(path, seed): return None\n") * 20)[:128]
    nll, counted = giant.score(tokens, window=64)
    logits = giant.logits(tokens[:64])[32:63].astype(float)
    first = [np.log(np.exp(row - row.max()).sum()) + row.max() - row[t] for row, t in zip(logits, tokens[33:64])]
    assert counted == 62 and nll > 0
    alone, _ = giant.score(tokens[:64], window=64)
    assert alone == pytest.approx(sum(first), rel=1e-4)


# --- Conversations. ---


def test_a_conversation_reads_only_what_is_new(giant):
    with giant.chat("Be brief.", **GREEDY) as chat:
        first = chat.say("hello")
        assert first.text is not None and first.cached_tokens == 0
        second = chat.say("go on")
        assert second.text is not None and second.cached_tokens > first.prompt_tokens - 3
        assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_conversation_that_outgrows_the_context_forgets_the_oldest_turns_and_says_so(small_llama):
    giant = Giant.load(small_llama, context=96)
    try:
        with giant.chat("S", temperature=0.0, max_tokens=8) as chat:
            for n in range(4):
                assert chat.say(f"message {n} " + "x " * 6).text is not None
            assert chat.forgotten > 0 and len(chat.messages) == 9
    finally:
        giant.close()


# --- Bad input. ---


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "nothing to answer"),
        ("x\ud800", {}, "not valid UTF-8"),
        ("x " * 2000, {}, "context holds 256"),
        ("x", dict(temperature=-1), "temperature is -1"),
        ("x", dict(tempreature=1), "no sampling setting 'tempreature'"),
        ("x", dict(max_tokens=-2), "max_tokens is -2"),
        ("x", dict(grammar="root ::= a"), "does not have"),
        ("x", dict(grammar='root ::= "a"', json_schema=True), "choose one"),
        ("x", dict(logit_bias={10**6: 1.0}), "logit_bias names token"),
    ],
)
def test_what_is_impossible_is_one_sentence_before_anything_is_computed(giant, prompt, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        giant.generate(prompt, **options)


def test_a_session_that_is_full_is_a_clear_error(giant):
    with pytest.raises(ContextFull):
        giant.session().feed([1] * 1000)


def test_a_long_prompt_is_read_in_pieces_that_give_the_same_logits(tmp_path):
    path = write_llama(tmp_path / "long.gguf", context=2 * PREFILL, metadata=byte_level(), width=32)
    giant = Giant.load(path, kv_cache="f32")
    try:
        text = "x " * (PREFILL - 40)
        assert giant.generate(text, **GREEDY).prompt_tokens > PREFILL - 100
        first = giant.generate(text, **GREEDY)
        assert first.text == giant.generate(text, **GREEDY).text
    finally:
        giant.close()
