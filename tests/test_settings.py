"""One flat record of settings: from the command line to config.yaml and back."""

import dataclasses

import pytest
import yaml

from hyperjax.app._errors import AppError
from hyperjax.app._settings import Settings, dump, load, make_settings

# Another value than the default for every field, as one types it.
OTHERS = {
    "task": ("a9a", "a9a"),
    "method": ("implicit", "implicit"),
    "members": ("6", 6),
    "seeds": ("3", 3),
    "seed": ("7", 7),
    "inner_steps": ("1000", 1000),
    "every": ("10", 10),
    "outer_lr": ("1e-3", 1e-3),
    "exchange": ("truncation", "truncation"),
    "exchange_every": ("2", 2),
    "explore": ("0", 0.0),
    "cg_steps": ("4", 4),
    "damping": ("0.25", 0.25),
    "sigma": ("2", 2.0),
    "chunk": ("2", 2),
    "devices": ("3", 3),
    "updates_per_chunk": ("9", 9),
    "baselines": ("random, replay", ("random", "replay")),
    "data_dir": ("data", "data"),
}


def saved(tmp_path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_every_field_has_another_value_here():
    assert list(OTHERS) == [field.name for field in dataclasses.fields(Settings)]
    default = Settings()
    assert [name for name, (_, value) in OTHERS.items() if getattr(default, name) == value] == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_can_be_set_saved_and_loaded(tmp_path, name):
    text, value = OTHERS[name]
    settings = make_settings({}, [f"{name}={text}"])
    assert settings == dataclasses.replace(Settings(), **{name: value})
    again = load(saved(tmp_path, dump(settings)))
    assert again == settings
    assert type(getattr(again, name)) is type(value)


def test_all_at_once(tmp_path):
    settings = make_settings({}, [f"{name}={text}" for name, (text, _) in OTHERS.items()])
    assert load(saved(tmp_path, dump(settings))) == settings


def test_set_comes_after_the_options():
    settings = make_settings({"members": 4, "seeds": 2}, ["members=8", "every = 5", "every=10"])
    assert (settings.members, settings.seeds, settings.every) == (8, 2, 10)


def test_no_baselines():
    assert make_settings({}, ["baselines="]).baselines == ()


@pytest.mark.parametrize("updates", [1, 4, 7, 12, 30])
@pytest.mark.parametrize("allowed", [1, 5, 100])
def test_calls_divide_the_run(updates, allowed):
    s = Settings(inner_steps=20 * updates, every=20, updates_per_chunk=allowed)
    assert s.updates == updates
    divisors = [n for n in range(1, updates + 1) if updates % n == 0 and n <= allowed]
    assert s.updates_per_call == divisors[-1]


def test_budget_counts_every_member():
    assert Settings(members=8, inner_steps=100, every=10).inner_steps_per_seed == 800


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("every", "expected KEY=VALUE"),
        ("evry=3", "no such setting; there are task, method"),
        ("every=ten", "expected int"),
        ("every=2.5", "expected int"),
        ("sigma=wide", "expected float"),
        ("members=0", "members must be at least 1; got 0"),
        ("seeds=-1", "seeds must be at least 1"),
        ("chunk=-1", "chunk must be at least 0"),
        ("outer_lr=0", "outer_lr must be positive"),
        ("outer_lr=nan", "outer_lr must be positive and finite; got nan"),
        ("sigma=inf", "sigma must be positive and finite; got inf"),
        ("damping=-0.1", "damping must be finite and not negative"),
        ("explore=nan", "explore must be finite and not negative"),
        ("seed=-1", "seed must be in 0..2147483642"),
        ("seed=2147483643", "seed must be in 0..2147483642"),
        ("method=magic", "unknown method 'magic'; choose from unroll"),
        ("exchange=barter", "unknown exchange 'barter'; choose from tournament"),
        ("baselines=random,grid", "unknown baseline 'grid'"),
        ("inner_steps=605", "multiple of every (20); try --set inner_steps=600"),
        ("inner_steps=7", "multiple of every (20); try --set inner_steps=20"),
    ],
)
def test_bad_values_are_named(assignment, message):
    with pytest.raises(AppError) as error:
        make_settings({}, [assignment])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_largest_seed():
    assert make_settings({}, ["seed=2147483642"]).seed == 2**31 - 1 - 5


def config(**changes: object) -> str:
    values = yaml.safe_load(dump(Settings())) | changes
    return yaml.safe_dump({k: v for k, v in values.items() if v is not ...})


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged: it is not YAML"),
        ("", "was not written by hyperjax"),
        ("- 1\n", "was not written by hyperjax"),
        (config(format=...), "was not written by hyperjax"),
        (config(format=2), "written by a newer hyperjax"),
        (config(format="one"), "is damaged: its format is 'one'"),
        (config(format=0), "is damaged: its format is 0"),
        (config(format=True), "is damaged: its format is True"),
        (config(members=...), "lacks the key 'members'"),
        (config(color="red"), "has an unknown key 'color'"),
        (config() + "1: 2\nb: 3\n", "has an unknown key 1"),
        (config(members="many"), "`members` must be int; got 'many'"),
        (config(members=2.5), "`members` must be int; got 2.5"),
        (config(members=True), "`members` must be int; got True"),
        (config(members=0), "members must be at least 1"),
        (config(outer_lr="fast"), "`outer_lr` must be float; got 'fast'"),
        (config(task=None), "`task` must be str; got None"),
        (config(baselines="random"), "`baselines` must be a list of names; got 'random'"),
        (config(baselines=[["random"]]), "`baselines` must be a list of names"),
        (config(method="magic"), "unknown method 'magic'"),
        (config(every=7), "must be a multiple of every (7)"),
    ],
)
def test_damaged_configurations_are_refused(tmp_path, text, message):
    with pytest.raises(AppError) as error:
        load(saved(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AppError, match="is damaged: it is not YAML"):
        load(tmp_path / "config.yaml")


def test_a_whole_number_typed_for_a_real_one_is_read(tmp_path):
    """Somebody who edits `damping: 1.0` into `damping: 1` means the same."""
    settings = load(saved(tmp_path, config(damping=1)))
    assert settings == Settings() and type(settings.damping) is float
