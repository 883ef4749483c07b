"""The configuration: ranges, the saved file, and what a resume may change."""

import dataclasses
import json

import pytest

from bn_tf1.jobs import config as configuration
from bn_tf1.jobs.choices import NETWORKS
from bn_tf1.jobs.config import CHANGEABLE, Config, ConfigError


@pytest.mark.parametrize(
    ("option", "value", "constraint"),
    [
        ("batch_size", 1, "at least 2"),
        ("batch_size", 2.5, "of type int"),
        ("batch_size", True, "of type int"),
        ("max_steps", 0, "at least 1"),
        ("learning_rate", 0.0, "greater than 0.0"),
        ("learning_rate", float("nan"), "greater than 0.0"),
        ("momentum", 1.0, "less than 1.0"),
        ("bn_decay", 1.5, "less than 1.0"),
        ("bn_decay", -0.1, "at least 0.0"),
        ("bn_decay", "mean", "of type float or cumulative"),
        ("bn_epsilon", 0.0, "greater than 0.0"),
        ("bn_epsilon", 1e-60, "greater than 0.0"),
        ("bn_decay", 1 - 1e-12, "less than 1.0"),
        ("learning_rate", 1e39, "finite"),
        ("model", "vgg", "one of mlp, convnet, resnet"),
        ("dataset", "imagenet", "one of digits, mnist"),
        ("normalization", "layer", "one of batch, none"),
        ("lr_schedule", "linear", "one of constant, cosine, step"),
        ("augment", "yes", "of type bool"),
        ("learning_rate", float("inf"), "finite"),
        ("grace_secs", 1e300, "less than"),
        ("max_steps", 2**31, "less than 2147483648"),
        ("model_dir", "", "the name of a folder"),
        ("data_format", "NCHW", "--model=convnet has channels last only"),
        ("data_format", "HWCN", "one of NHWC, NCHW"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(option, value, constraint):
    with pytest.raises(ConfigError) as error:
        Config(**{option: value})
    message = str(error.value)
    assert f"--{option} is {value!r}" in message
    assert constraint in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bn_decay_warm_up": True}, "the mean of all steps needs none"),
        ({"bn_kernel": "recipe"}, "--bn_kernel is 'recipe'"),
    ],
)
def test_the_mean_of_all_steps_goes_with_no_other_decay(options, words):
    with pytest.raises(ConfigError, match=words):
        Config(bn_decay="cumulative", **options)


def test_a_list_in_the_place_of_a_name_is_named():
    with pytest.raises(
        ValueError, match=r"model is \['mlp'\], but must be of type str"
    ):
        Config(model=["mlp"])


def test_a_float_option_takes_an_int():
    assert Config(learning_rate=1).learning_rate == 1


@pytest.mark.parametrize("model", sorted(NETWORKS))
def test_the_learning_rate_is_the_models_unless_it_is_given(tmp_path, model):
    given = {"model_dir": str(tmp_path), "model": model}
    config = configuration.resolve(given)
    assert config.learning_rate == NETWORKS[model].learning_rate
    configuration.save(config)
    assert f'"learning_rate": {NETWORKS[model].learning_rate}' in (
        (tmp_path / "config.json").read_text()
    )
    assert configuration.resolve({"model_dir": str(tmp_path)}) == config
    assert Config(model=model, learning_rate=0.25).learning_rate == 0.25


def test_what_an_older_file_does_not_say_is_what_was_done_then(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 3}')
    loaded = configuration.load(str(tmp_path))
    assert loaded.seed == 3
    assert not loaded.scale_features
    assert Config().scale_features


def test_without_an_earlier_run_given_options_stand_over_the_defaults(tmp_path):
    given = {"model_dir": str(tmp_path), "batch_size": 8}
    assert configuration.resolve(given) == Config(**given)


def test_saved_and_loaded_configuration_is_the_same(tmp_path):
    config = Config(model_dir=str(tmp_path / "new"), batch_size=8, augment=False)
    configuration.save(config)
    assert configuration.load(config.model_dir) == config


def test_a_moved_model_directory_is_where_it_is_now(tmp_path):
    configuration.save(Config(model_dir=str(tmp_path / "old"), batch_size=8))
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = configuration.load(str(tmp_path / "new"))
    assert loaded == Config(model_dir=str(tmp_path / "new"), batch_size=8)


def test_resume_takes_what_is_not_given_from_the_earlier_run(tmp_path):
    saved = Config(model_dir=str(tmp_path), model="mlp", batch_size=8)
    configuration.save(saved)
    resumed = configuration.resolve({"model_dir": str(tmp_path), "batch_size": 8})
    assert resumed == saved


@pytest.mark.parametrize("option", sorted(CHANGEABLE - {"model_dir"}))
def test_resume_may_change_where_how_long_and_how_often(tmp_path, option):
    dataset = "images" if option == "max_bad_examples" else "digits"
    saved = Config(model_dir=str(tmp_path), dataset=dataset)
    configuration.save(saved)
    default = getattr(saved, option)
    others = {str: "elsewhere", bool: not default, int: 1, float: 1.0}
    value = others[type(default)]
    given = {"model_dir": str(tmp_path), option: value}
    expected = dataclasses.replace(saved, **{option: value})
    assert configuration.resolve(given) == expected


def test_resume_with_a_conflicting_flag_names_both_values(tmp_path):
    configuration.save(Config(model_dir=str(tmp_path), batch_size=32))
    with pytest.raises(ConfigError) as error:
        configuration.resolve({"model_dir": str(tmp_path), "batch_size": 64})
    message = str(error.value)
    assert "--batch_size is 64" in message
    assert "started with 32" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image_size": 64}, "without --dataset=images or --dataset=tfrecord, and "),
        ({"dataset": "synthetic", "data_dir": "d"}, "--dataset is 'synthetic': leave"),
        ({"normalization": "none", "bn_kernel": "fused"}, "--normalization is 'none'"),
        ({"model": "mlp", "resnet_n": 3}, "--resnet_n is 3, but does nothing without"),
        ({"bn_weight_decay": True, "weight_decay": 0.0}, "without --weight_decay=..."),
        ({"init_exclude": "logits"}, "--init_checkpoint is ''"),
    ],
)
def test_an_option_that_does_nothing_is_refused(tmp_path, given, words):
    with pytest.raises(ConfigError) as error:
        configuration.resolve({"model_dir": str(tmp_path), **given})
    assert words in str(error.value)


def test_what_does_nothing_is_told_by_the_options_of_the_run(tmp_path):
    given = {"model_dir": str(tmp_path), "dataset": "synthetic", "synthetic_size": 4}
    configuration.save(configuration.resolve(given))
    again = {"model_dir": str(tmp_path), "synthetic_size": 4}
    assert configuration.resolve(again).synthetic_size == 4


def test_every_option_that_depends_on_another_is_one():
    names = {field.name for field in dataclasses.fields(Config)}
    for options, other, _ in configuration._ACT_ONLY_WITH:
        assert {*options, other} <= names


def test_a_missing_configuration_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*config\.json"):
        configuration.load(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"unknown_option": 1}',
        '{"batch_size": "many"}',
        '{"momentum": 1' + "0" * 400 + "}",
        '{"weight_decay": 1' + "0" * 400 + "}",
    ],
    ids=[
        "empty",
        "truncated",
        "list",
        "unknown option",
        "wrong type",
        "too large",
        "larger than a float",
    ],
)
def test_a_damaged_configuration_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not a saved configuration"):
        configuration.load(str(tmp_path))


def test_the_saved_file_is_readable_json(tmp_path):
    configuration.save(Config(model_dir=str(tmp_path), seed=3))
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["seed"] == 3
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_bfloat16_needs_tensorflow_2(monkeypatch):
    monkeypatch.setattr("tensorflow.compat.v1.version.VERSION", "1.15.5")
    with pytest.raises(
        ConfigError, match="--precision is 'bfloat16', but TensorFlow 1"
    ):
        Config(precision="bfloat16")
    monkeypatch.setattr("tensorflow.compat.v1.version.VERSION", "2.21.0")
    assert Config(precision="bfloat16").precision == "bfloat16"


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_in_the_place_of_a_folder_is_told(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--model_dir is .* is a file, but must"):
        configuration.resolve({"model_dir": str(tmp_path / name)})


def test_an_option_of_another_version_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"sede": 3}')
    with pytest.raises(
        ConfigError, match="no option sede; put a good copy back, or move"
    ):
        configuration.load(str(tmp_path))
