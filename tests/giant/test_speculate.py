"""Drafting by a model's own head for multi-token prediction: the head against torch, and the same text in fewer steps.

Run alone: pytest -n 0 tests/giant/test_speculate.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from organs.giant import Giant
from organs.giant.convert import convert

from .test_convert import SIZE, save_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .test_experts import CASES, build  # noqa: E402

PROMPT = np.random.default_rng(3).integers(0, SIZE, 100).tolist()


class Head(torch.nn.Module):
    """The head as Qwen3-Next has it: norm(embedding) and norm(state) through a matrix, a layer, a norm, and the model's table."""

    def __init__(self, model):
        super().__init__()
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

        c = model.config
        self.model = [model]  # not a part of it
        self.fc = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = torch.nn.ModuleList([Qwen3NextDecoderLayer(c, 3)])
        self.norm = Qwen3NextRMSNorm(c.hidden_size, c.rms_norm_eps)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)

    def forward(self, tokens):
        """Logits [n - 1, vocabulary]: row t says what comes behind token t + 1."""
        model = self.model[0]
        ids = torch.tensor(tokens)[None]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[:, :-1]
            embedded = model.model.embed_tokens(ids[:, 1:])
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)], -1))
        n = x.shape[1]
        turned = model.model.rotary_emb(x, torch.arange(n)[None])
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        return model.lm_head(self.norm(self.layers[0](x, turned, mask)))[0]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """(the head, path of the model with it, what the model writes): the head has learned that text, so that it is often right."""
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mtp")
    model = build(CASES["qwen3next"])
    model.save_pretrained(folder)
    save_tokenizer(folder)
    convert(folder, folder / "plain.gguf", "f32")
    giant = Giant.load(folder / "plain.gguf", kv_cache="f32", exact=True, threads=1)
    written = list(giant.generate_ids(PROMPT, 80))
    giant.close()
    torch.manual_seed(1)
    head, text = Head(model), PROMPT + written
    optimiser = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(head(text)[98:-1], torch.tensor(text[100:]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    own = {f"mtp.{name}": value.contiguous() for name, value in head.state_dict().items()}
    save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors")
    convert(folder, folder / "mtp.gguf", "f32")
    return head, folder / "mtp.gguf", written


def load(path, **settings) -> Giant:
    return Giant.load(path, **dict(kv_cache="f32", threads=2, speculate=True) | settings)


def test_the_head_computes_what_torch_does(drafting):
    head, path, _ = drafting
    giant = load(path)
    giant.feeder(giant.session()).feed(PROMPT)
    with torch.no_grad():
        want = head(PROMPT)[-1].numpy()
    assert np.abs(giant._logits[: giant.vocab_size] - want).max() < 1e-3 * max(1, np.abs(want).max() / 10)
    giant.close()


def test_greedy_text_is_the_same_in_fewer_steps(drafting):
    _, path, written = drafting
    giant = load(path)
    feeder = giant.feeder(giant.session())
    tokens, logits = [], feeder.feed(PROMPT)
    for _ in range(80):
        tokens.append(int(logits.argmax()))
        logits = feeder.feed(tokens[-1:])
    assert tokens == written
    assert feeder.forwards < 0.8 * feeder.tokens
    giant.close()


@pytest.mark.parametrize("kind", ["f32", "q4"])
def test_whatever_is_fed_its_logits_are_those_without(kind, drafting):
    """Right and wrong guesses mixed, over the ends of pages; then the session goes on by itself, and from a snapshot."""
    _, path, written = drafting
    rng = np.random.default_rng(4)
    fed = [token if rng.random() < 0.8 else int(rng.integers(0, SIZE)) for token in written[:70]]
    plain = Giant.load(path, kv_cache=kind, exact=True, threads=1)
    session = plain.session()
    session.feed(PROMPT)
    want = [session.feed([token]) for token in fed]
    last = session.feed([1, 2])
    plain.close()
    giant = load(path, kv_cache=kind, threads=1)
    session = giant.session()
    feeder = giant.feeder(session)
    feeder.feed(PROMPT)
    got = [feeder.feed([token]) for token in fed]
    feeder.finish()
    bound = 1e-3 if kind == "f32" else 0.1  # what is read together is quantised a step later
    assert np.abs(np.stack(got) - np.stack(want)).max() < bound
    assert session.tokens == PROMPT + fed
    assert np.abs(session.feed([1, 2]) - last).max() < bound
    assert np.abs(giant.session().feed(PROMPT + fed + [1, 2]) - last).max() < bound
    giant.close()


def test_a_generation_says_how_many_steps_it_took(drafting):
    _, path, _ = drafting
    giant = load(path)
    answer = giant.generate("Once upon a time", max_tokens=20, temperature=0.0)
    assert len(answer.text) and 0 < answer.forwards < len(answer.tokens) + 1
    giant.close()


def test_a_file_without_such_a_head_is_refused(small_llama):
    with pytest.raises(ValueError, match="has no head for multi-token prediction"):
        Giant.load(small_llama, speculate=True)
    with pytest.raises(ValueError, match="is for --device cpu"):
        Giant.load(small_llama, speculate=True, device="torch")
