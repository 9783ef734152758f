"""Settings: defaults, file, environment, flags; and what is wrong with a wrong one.   pytest tests/test_config.py"""

import dataclasses
import tomllib

import pytest

import organism as o


def load(tmp_path, text=None, overrides=None, environ=None):
    if text is not None:
        (tmp_path / "organism.toml").write_text(text)
    return o.Config.load(tmp_path, overrides, environ or {})


def test_the_defaults_are_the_table():
    config = o.Config.load(None, None, {})
    assert config == o.Config()
    assert config.body.field is True and config.learning.rate == 0.004 and config.field.view_width == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learning.rate = 1.0  # type: ignore[misc]


def test_every_setting_has_a_meaning_and_every_rule_a_setting():
    table = o.settings_table()
    assert len(table) > 50
    assert not [name for name, _, meaning in table if len(meaning) < 10]
    names = {name for name, _, _ in table}
    assert set(o.CONFIG_LIMITS) <= names and set(o.CONFIG_CHOICES) <= names


def test_every_default_is_a_legal_value():
    default = o.Config()
    assert default.replace(dict(default.items())) == default


def test_sources_outrank_each_other_in_rising_order(tmp_path):
    text = "[voice]\ntemperature = 0.1\ntop_k = 1\nmin_p = 0.01\n"
    environ = {"ORGANISM_VOICE_TEMPERATURE": "0.2", "ORGANISM_VOICE_TOP_K": "2", "ORGANISM_HOME": "/x", "PATH": "/bin"}
    config = load(tmp_path, text, {"voice.temperature": 0.3, "voice.top_p": None}, environ)
    assert (config.voice.temperature, config.voice.top_k, config.voice.min_p) == (0.3, 2, 0.01)
    assert config.voice.top_p == o.Config().voice.top_p


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("body.field", "off", False), ("body.field", "TRUE", True), ("learning.batch", "1_000", 1000),
        ("learning.rate", "1e-3", 0.001), ("body.head_types", "content, hybrid", ("content", "hybrid")),
        ("body.head_types", "", ()), ("learning.engine", "torch", "torch"),
    ],
)  # fmt: skip
def test_text_is_parsed_as_the_type_of_the_default(name, text, value):
    assert o.Config().replace({name: text}).get(name) == value


@pytest.mark.parametrize(
    "text, words",
    [
        ("[voice]\ntemprature = 1\n", ["voice.temprature", "did you mean 'voice.temperature'", "organism.toml"]),
        ("temperature = 1\n", ["'temperature'", "did you mean 'voice.temperature'"]),
        ("[voces]\ntemperature = 1\n", ["voces.temperature", "voice.temperature"]),
        ("[nonsense]\nxyzzy = 1\n", ["nonsense.xyzzy", "sections are body"]),
        ("[nonsense]\n", ["nonsense"]),
        ("[learning]\nbatch = 'many'\n", ["learning.batch", "a whole number", "'many'"]),
        ("[learning]\nbatch = 1.5\n", ["learning.batch", "a whole number", "1.5"]),
        ("[learning]\nbatch = true\n", ["learning.batch", "a whole number"]),
        ("[learning]\nbatch = 0\n", ["learning.batch", "between 1 and"]),
        ("[learning]\nrate = -1\n", ["learning.rate", "at least 0"]),
        ("[learning]\nrate = nan\n", ["learning.rate", "a number"]),
        ("[body]\nfield = 2\n", ["body.field", "on or off"]),
        ("[body]\nstage = 'giant'\n", ["body.stage", "one of embryo"]),
        ("[body]\nhead_types = ['round']\n", ["body.head_types", "one of content"]),
        ("[voice]\nblend = 3\n", ["voice.blend", "a text"]),
        ("[voice.deep]\nx = 3\n", ["voice.deep"]),
        ("[voice\n", ["organism.toml is not valid TOML"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, text, words):
    with pytest.raises(o.UsageError) as error:
        load(tmp_path, text)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[voice]\nentropy_low = 2.0", r"voice.entropy_low is 2.0, which is more than voice.entropy_high, 1.5"),
        ("[field]\ntable_mb = 256", r"field.table_mb is 256, which is more than field.max_table_mb, 128"),
        ("[syntropy]\ndelta_births = true", r"syntropy.delta_births = true does nothing without syntropy.steer = true"),
        (
            '[learning]\nprecision = "bf16"',
            r'learning.precision = "bf16" does nothing without learning.engine = "torch"',
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, text, words):
    (tmp_path / "organism.toml").write_text(text)
    with pytest.raises(o.UsageError, match=words):
        o.Config.load(tmp_path, environ={})


def test_an_unknown_variable_of_a_section_is_an_error_that_names_the_environment(tmp_path):
    with pytest.raises(o.UsageError, match="body.stagee.*the environment.*body.stage"):
        load(tmp_path, environ={"ORGANISM_BODY_STAGEE": "adult"})
    with pytest.raises(o.UsageError, match="the command line"):
        load(tmp_path, overrides={"learning.batches": 3})


def test_writing_keeps_comments_and_changes_only_what_differs(tmp_path):
    text = "# mine\n[voice]\ntemperature = 0.5  # calm\n"
    config = load(tmp_path, text).replace({"voice.top_k": 7, "body.head_types": ("content", "hybrid")})
    config.write(tmp_path)
    written = (tmp_path / "organism.toml").read_text()
    assert "# mine" in written and "temperature = 0.5  # calm" in written
    assert tomllib.loads(written) == {
        "voice": {"temperature": 0.5, "top_k": 7},
        "body": {"head_types": ["content", "hybrid"]},
    }
    assert load(tmp_path) == config
    config.write(tmp_path)
    assert (tmp_path / "organism.toml").read_text() == written


def test_a_new_file_lists_every_setting_commented_out(tmp_path):
    o.Config().write(tmp_path)
    text = (tmp_path / "organism.toml").read_text()
    assert not any(tomllib.loads(text).values())
    assert load(tmp_path) == o.Config()
    every = tomllib.loads(text.replace("\n# ", "\n"))
    assert {f"{s}.{k}" for s, keys in every.items() for k in keys} == {name for name, _ in o.Config().items()}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    monkeypatch.setattr(o.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        o.write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
