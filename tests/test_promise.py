"""The promise: each row of docs/molequla.md names settings, commands and tests that exist.   pytest tests/test_promise.py"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import organism as o

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "molequla.md").read_text(encoding="utf-8")

# The fields of the original's Config, so that a row that is lost is noticed.
THEIR_CONFIG = """corpus_path db_path ckpt_path max_corpus_lines max_line_chars min_new_chars_to_train tie_embeddings n_layer
n_embd n_head block_size growth_stages freeze_after_growth_steps post_growth_lr_scale head_types hybrid_alpha_init
gamma_sparsity_threshold noise_drift_threshold gamma_min_magnitude warmup_steps micro_steps learning_rate beta1 beta2 eps_adam
grad_clip freeze_base_after_warmup batch_size accum_steps lr_min max_total_steps cosine_warmup_steps delta_rank
max_delta_modules delta_grow_prob temperature top_k top_p min_p typical_p max_gen_tokens min_gen_tokens repetition_guard
enable_bpe_after_chars bpe_num_merges bpe_retrain_every_chars train_tick_seconds qb_min_bytes qb_min_novelty
qb_cooldown_seconds entropy_low entropy_high entropy_temp_boost entropy_temp_focus corpus_gen_max_tokens corpus_fade_k
corpus_fade_threshold syntropy_window field_deviation_ceiling field_deviation_floor syntropy_lr_boost syntropy_lr_dampen
syntropy_delta_grow_boost dissonance_ema_alpha dissonance_spike_k dissonance_drop_k dissonance_spike_threshold
dissonance_drop_threshold anti_field_prob anti_field_min_step overthinkc_rounds overthinkc_max_tokens conscience_window
conscience_decay conscience_recovery conscience_floor""".split()

# The flags of its Python, Rust and Go programs.
THEIR_FLAGS = """--organism-id --config --element --evolution --spa-gate --corpus-overlay --trainer --zero-warmup --gpu
--cross-graze --db --ckpt""".split()

SECTIONS = {name: section for name in vars(o.Config()) if (section := getattr(o.Config(), name))}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(pattern: str) -> list[str]:
    return sorted(set(re.findall(f"`({pattern})`", PAGE)))


@pytest.mark.parametrize(
    "name",
    [n for n in names(r"[a-z]+\.[a-z_0-9]+") if n not in ("memory.db", "mesh.db", "birth.json", "organism.toml")],
)
def test_each_named_setting_exists(name):
    section, _, key = name.partition(".")
    assert hasattr(SECTIONS[section], key)


@pytest.mark.parametrize("row", rows("Config"), ids=lambda row: row[0].strip("`"))
def test_each_default_is_the_one_that_is_written(row):
    theirs, _, here, default, _ = row
    if default:
        section, _, key = here.strip("`").partition(".")
        assert getattr(SECTIONS[section], key) == ast.literal_eval(default), theirs


def test_each_field_of_their_config_has_a_row():
    found = [name for row in rows("Config") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(found) == sorted(THEIR_CONFIG)


def test_each_of_their_flags_has_a_row():
    found = [flag for row in rows("Arguments") for flag in re.findall(r"`(--[a-z-]+)`", row[0])]
    assert sorted(found) == sorted(THEIR_FLAGS)


@pytest.mark.parametrize("name", names(r"organism [a-z ]+"))
def test_each_named_command_exists(name):
    import click

    command: click.Command = o.command_line()
    for word in name.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[word]


@pytest.mark.parametrize("path", names(r"tests/[a-z_]+\.py"))
def test_each_named_test_exists(path):
    assert "def test_" in (ROOT / path).read_text(encoding="utf-8")


def test_each_feature_and_topic_names_a_test():
    for row in rows("Features") + rows("Topics of its tests"):
        assert "`tests/" in row[-1], row
