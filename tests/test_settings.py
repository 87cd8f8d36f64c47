import json
from dataclasses import FrozenInstanceError, fields

import pytest

from errors import UsageError, UserError
from settings import Settings

SETTINGS = Settings(shards=("a", "b"), mode="dir", lr_drop_epochs=(2, 4), schedule="step")


def test_settings_survive_json() -> None:
    again = Settings.from_dict(json.loads(json.dumps(SETTINGS.to_dict())), "config.json")
    assert again == SETTINGS


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SETTINGS.lr = 1.0


def test_unknown_and_missing_keys_raise_and_are_named() -> None:
    values = SETTINGS.to_dict()
    with pytest.raises(UserError, match=r"config\.json.*colour"):
        Settings.from_dict(values | {"colour": 1}, "config.json")
    del values["shards"]
    with pytest.raises(UserError, match=r"settings shards are unknown or missing"):
        Settings.from_dict(values, "config.json")


def test_an_option_that_an_older_run_did_not_have_takes_its_default() -> None:
    values = SETTINGS.to_dict()
    del values["queue_start"]
    assert Settings.from_dict(values, "config.json") == SETTINGS


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "fast"), ("moco_k", 1.5), ("mode", "gan"), ("shards", [1]), ("compile", "yes")]
)
def test_wrong_types_raise_and_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"setting {name}"):
        Settings.from_dict(SETTINGS.to_dict() | {name: value}, "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("crop_size", 100),
        ("moco_m", 1.5),
        ("adv_weight", -1.0),
        ("epochs", 0),
        ("shards", ()),
        ("lr_drop_epochs", ()),
    ],
)
def test_values_that_cannot_be_meant_are_bad_usage(name: str, value: object) -> None:
    with pytest.raises(UsageError):
        Settings(**{field.name: getattr(SETTINGS, field.name) for field in fields(Settings)} | {name: value})


def test_epochs_default_as_published() -> None:
    assert [Settings(("a",), mode).num_epochs for mode in ("di", "dir", "dira")] == [1200, 1200, 400]


def test_another_configuration_is_refused_and_its_differences_are_named() -> None:
    theirs = Settings(shards=("a",), mode="dir", lr=0.1, log_every=7)
    with pytest.raises(UserError, match=r"--lr 0\.1 there, 0\.03 here\)"):
        Settings(shards=("a",), mode="dir").refuse_other(theirs, "config.json")


def test_what_may_change_on_resume_are_settings_and_is_not_refused() -> None:
    assert {field.name for field in fields(Settings)} >= Settings.MAY_CHANGE
    theirs = Settings(shards=("a",), mode="dir", max_steps=3, device="cpu", compile=True)
    Settings(shards=("a",), mode="dir").refuse_other(theirs, "config.json")
