"""Recipes: what a user gets wrong is told at once, and what is right survives every trip."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from conftest import TINY, tiny_recipe
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401 (fixtures)

from pirl.config import LossConfig, Recipe, load_recipe, parse_recipe, recipe_names
from pirl.errors import ConfigError, UsageError
from pirl.storage import open_storage


def problems(*overrides: str, text: str = TINY) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, overrides)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.what.splitlines()


def test_every_problem_is_told_at_once() -> None:
    first, *lines = problems(
        "train.epochs=0",
        "loss.temperature=-1",
        "model.head=linaer",
        "optim.learning_rate=0.1",
        "views.hue=0.7",
        "nonsense",
        "eval.crop=300",
    )
    assert first == "recipe: 7 problems"
    text = "\n".join(lines)
    for part in ("train.epochs", "temperature", "'linear'", "optim.learning_rate", "hue", "'nonsense'", "crop of 300"):
        assert part in text
    assert "(got 0)" in text
    assert "(got 'linaer')" in text


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.epoch", "train.epochs"),
        ("loss.temprature", "loss.temperature"),
        ("views.image_sise", "views.image_size"),
        ("optim.base_learning_rate", "optim.base_lr"),
        ("batch_size", "train.batch_size"),
        ("nmae", "name"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    (line,) = problems(f"{key}=1")[1:]
    assert line.strip() == f"unknown key {key!r}. Did you mean {meant!r}?"


def test_unknown_key_without_a_near_one_guesses_nothing() -> None:
    (line,) = problems("zzz.qqq=1")[1:]
    assert line.strip() == "unknown key 'zzz'."


def test_missing_keys_are_named() -> None:
    text = "\n".join(problems(text="name = 'x'\n[train]\nepochs = 1\n"))
    assert "format is missing" in text
    assert "train.batch_size is missing" in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("views.patch_size=7", "larger than a cell"),
        ("views.image_scale=[0.5, 0.2]", "rising pair"),
        ("views.patch_scale=[0.5, 1.5]", "rising pair from 1e-06 to 1"),
        ("views.image_size=4", "views.image_size 4 is too small"),
        ("views.image_scale=[0.1]", "views.image_scale"),
        ("loss.temperature=nan", "loss.temperature"),
        ("train.seed=-1", "train.seed"),
        ("train=3", "train"),
        ("name.first=3", "'name' is not a section"),
        ("=3", "not of the form"),
        ("format=2", "format"),
        ("model.layers=[3, 4, 6]", "model.layers"),
        ("model.layers=[0, 1, 1, 1]", "model.layers.0"),
        ("model.layers=[-1, 1, 1, 1]", "model.layers.0"),
        ("model.width=0.001", "model.width"),
        ("model.width=1e9", "model.width"),
        ("views.std=[0, 0, 0]", "views.std.0"),
        ("views.std=[inf, 1, 1]", "views.std.0"),
        ("views.brightness=1e39", "views.brightness"),
        ("views.image_ratio=[1e-9, 1e-9]", "image_ratio"),
        ("loss.temperature=0.011", "at least 0.02"),
        ("optim.momentum=0", "nesterov needs a momentum"),
        ("train.epochs=true", "true or false"),
        ('train.epochs="5"', "not a text"),
        ("train.epochs=05", "not a text"),
        ("name=../x", "name"),
        ("name=", "name"),
        # one TOML value and nothing more
        ("train.epochs=3\ntrain.batch_size=4", "line break"),
        ("train.epochs=3 # three", "without a comment"),
        ("train.epochs=3, 4", "train.epochs"),
        ("train.epochs=3] #", "train.epochs"),
        ("views.image_scale=[0.3, 1.0] 5", "not one TOML value"),
        ('name="a" "b"', "not one TOML value"),
        ("model={width = 0.5}", "one key of a section"),
    ],
)
def test_impossible_values(override: str, part: str) -> None:
    assert part in "\n".join(problems(override, text=TINY.replace("base_lr", "nesterov = true\nbase_lr")))


def test_a_key_that_is_given_twice_is_refused() -> None:
    assert "train.epochs is given twice" in "\n".join(problems("train.epochs=7", "train.epochs=8"))


def test_not_toml_and_no_such_recipe(tmp_path: Path) -> None:
    assert "not valid TOML" in problems(text="name = ")[0]
    with pytest.raises(UsageError, match="Did you mean 'demo'"):
        load_recipe("dmeo")
    with pytest.raises(UsageError, match="cannot read recipe"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read recipe"):
        load_recipe(tmp_path / "binary.toml")


def test_a_recipe_in_a_bucket(bucket: str) -> None:  # noqa: F811
    open_storage(bucket).write_bytes("recipes/tiny.toml", TINY.encode())
    open_storage(bucket).write_bytes("binary.toml", b"\xff\xfe")
    recipe = load_recipe(f"{bucket}/recipes/tiny.toml", ["train.epochs=7"])
    assert recipe == parse_recipe(TINY, ["train.epochs=7"])
    for name, reason in (("absent.toml", "cannot read recipe s3://"), ("binary.toml", "codec can't decode")):
        with pytest.raises(UsageError, match=reason):
            load_recipe(f"{bucket}/{name}")
    with pytest.raises(UsageError, match="not a storage location"):
        load_recipe("gs://bucket/tiny.toml")


def test_overrides() -> None:
    recipe = tiny_recipe(
        "views.image_scale=[0.2, 0.9]",
        "loss.kind=cross_entropy",
        'model.head = "linear"',
        "loss.exclude_positive=true",
        "name=a=b",
        " train.epochs = 8 ",
        "data.images=12",
    )
    assert recipe.train.epochs == 8
    assert recipe.views.image_scale == (0.2, 0.9)
    assert recipe.loss.kind == "cross_entropy"
    assert recipe.loss.exclude_positive
    assert recipe.model.head == "linear"
    assert recipe.name == "a=b"
    assert recipe.data.images == 12


@pytest.mark.parametrize("name", [*recipe_names(), TINY])
def test_round_trip(name: str) -> None:
    recipe = parse_recipe(name) if "\n" in name else load_recipe(name)
    again = parse_recipe(recipe.to_toml())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.to_toml() == recipe.to_toml()


def test_digest_is_over_what_is_learned_and_nothing_else() -> None:
    digest = tiny_recipe().digest()
    assert tiny_recipe("name=other", "description=new", "published_top1=50.0").digest() == digest
    assert tiny_recipe("optim.base_lr=0.80").digest() == digest
    assert tiny_recipe("model.width=0.06250").digest() == digest
    assert tiny_recipe("eval.crop=15").digest() == digest
    assert tiny_recipe("views.hue=0.2", "optim.momentum=0.9", "data.images=0").digest() == digest  # the defaults
    changes = [
        "optim.base_lr=0.81",
        "train.seed=1",
        "loss.negatives=15",
        "views.flip_probability=0.4",
        "data.images=41",
        "memory.momentum=0.4",
        "train.epochs=4",
        "train.precision=bf16",
    ]
    assert len({digest, *(tiny_recipe(change).digest() for change in changes)}) == len(changes) + 1


DIGESTS_OF_0_1 = {
    "demo": "086ff8a3e5f264f443f336ffa04e618c1b6f997dbe77e227c750e9cb402adaad",
    "demo-long": "c01e71fb9a7d43b930f4381edb929267d434afdcee711b7d99c73c63371b2a20",
    "r50-200ep-linear": "ff7f295f98b373d09a85970ccebd88751df81fe6529bcb085fa734749425593d",
    "r50-200ep-mlp": "c430c918daf9ed6ecac86d1e5f2e95ebf9f6ae5baab06428280c4ec63e501364",
    "r50-800ep-linear": "3029e5aba80710aa0daaeb1ce30494ccd3cbb52952eaa0864fdedd53076634f1",
    "r50-800ep-mlp": "66be22b4f393f7799689d39fe1af1c9471e04ec3c3b5604ee2f5384480f1c427",
    "r50w2-400ep-linear": "2f96be61bab7bcec9b82732a56e33442287498c896705e76661e6672b3c02ab6",
    "r50w2-400ep-mlp": "ec72af09b5c891e5b1c58e7a7c8898039f481ef86eee48fb2d5a81865d8739bb",
}


@pytest.mark.parametrize("name", DIGESTS_OF_0_1)
def test_digests_that_version_0_1_recorded_are_recognised(name: str) -> None:
    assert DIGESTS_OF_0_1[name] in load_recipe(name).digests()
    assert DIGESTS_OF_0_1[name] not in load_recipe(name, ["train.seed=5"]).digests()


def test_a_new_key_at_its_default_changes_no_digest() -> None:
    class Later(LossConfig):
        added: float = 0.5

    class LaterRecipe(Recipe):
        loss: Later = Later()

    tree = tomllib.loads(TINY)
    assert LaterRecipe.model_validate(tree).digest() == tiny_recipe().digest()
    tree["loss"]["added"] = 0.25
    assert LaterRecipe.model_validate(tree).digest() != tiny_recipe().digest()


def test_differences_name_each_changed_setting() -> None:
    there = tiny_recipe("name=other", "optim.base_lr=0.5", "loss.kind=cross_entropy")
    assert tiny_recipe().differences(there) == [
        "loss.kind: 'nce' -> 'cross_entropy'",
        "optim.base_lr: 0.8 -> 0.5",
    ]


def test_linear_scaling_and_steps() -> None:
    recipe = tiny_recipe("optim.base_lr=0.03", "train.batch_size=1024")
    assert recipe.learning_rate == pytest.approx(0.12, rel=1e-15)
    assert recipe.steps_per_epoch(1_281_167) == 1252  # the reference's count for 32 ranks of 32
    assert tiny_recipe("train.last_batch=drop", "train.batch_size=1024").steps_per_epoch(1_281_167) == 1251


def test_recipe_and_data_that_do_not_fit() -> None:
    recipe = tiny_recipe("train.batch_size=50", "loss.negatives=60", "data.images=30")
    with pytest.raises(ConfigError) as caught:
        recipe.check_data(42)
    for part in ("batch_size is 50, there are 30", "negatives is 60"):
        assert part in caught.value.what
    tiny_recipe("train.batch_size=42", "loss.negatives=42").check_data(42)
    with pytest.raises(ConfigError, match="negatives is 16"):
        tiny_recipe("data.images=12").check_data(42)


@pytest.mark.parametrize("images", [2, 3, 5, 42])
@pytest.mark.parametrize(
    "overrides", [["train.batch_size=500"], ["loss.negatives=600"], ["loss.exclude_positive=true"]]
)
def test_what_the_hint_proposes_works(images: int, overrides: list[str]) -> None:
    changed = {"train.batch_size": 500, "loss.negatives": 600} | dict(item.split("=") for item in overrides)
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(*(f"{key}={value}" for key, value in changed.items())).check_data(images)
    changed |= dict(word.split("=") for word in caught.value.hint.split() if "=" in word)
    tiny_recipe(*(f"{key}={value}" for key, value in changed.items())).check_data(images)


def test_one_image_has_no_negatives() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe("loss.exclude_positive=true", "loss.negatives=1", "train.batch_size=1").check_data(1)
    assert "at least two images" in caught.value.hint


def test_sections_are_frozen(tiny: Recipe) -> None:
    with pytest.raises(ValueError):
        tiny.train.epochs = 5  # type: ignore[misc]
