"""The configuration of a training run: options, their defaults, their file.

Contract: every option of `train.py` is a field of `Config`, and its default, unit and
range stand here only. The configuration is saved as `config.json` in the model
directory; a later run in that directory, and the evaluation job, read it from there, so
that no option must be repeated. Options that define the run cannot change once it has
begun; `CHANGEABLE` ones (where, how long, how often to report) can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from typing import Any, Mapping

import numpy as np

from bn_tf1.jobs import choices
from bn_tf1.jobs.choices import (
    CHANNELS_FIRST,
    CUMULATIVE,
    DATASETS,
    NETWORKS,
    STREAMED,
)
from bn_tf1.jobs.data.idx_and_cifar import DataFileError
from bn_tf1.jobs.saving import durable_files

CONFIG_FILE = "config.json"

# Options whose default depends on the model, and what it is called there.
_OF_THE_MODEL = {"learning_rate": "learning_rate", "bn_epsilon": "epsilon"}


class ConfigError(ValueError):
    """An option is out of range, or conflicts with the saved configuration."""

    # train.py catches it while TensorFlow is not imported yet: exit code 2, at once.


def _option(
    default,
    help,
    *,
    kind=None,
    choices=None,
    minimum=None,
    below=None,
    above=None,
    words=(),
):
    """A field with all that is known of an option.

    `default` is None if another option decides, `kind` the type if `default` does not tell
    it; `minimum` is allowed, `above` and `below` are not; `words` may stand in the place of a
    number.
    """
    kind = kind or type(default)
    if kind is int and below is None:
        below = 2**31  # TensorFlow's int32
    limits = {"choices": choices, "minimum": minimum, "above": above, "below": below}
    about = {"help": help, "kind": kind, "words": words, **limits}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a training run. One field per flag of train.py."""

    data_dir: str = _option(
        "", "Folder of the data set's original files; digits needs none."
    )
    dataset: str = _option("digits", "Data set to train on.", choices=DATASETS)
    data_checksum: str = _option(
        "",
        "SHA-256 that the content of the data files must have, in hexadecimal; by "
        "default that of the files that the run begins with.",
    )
    synthetic_size: int = _option(
        32, "Height and width of synthetic images, in pixels.", minimum=1
    )
    synthetic_channels: int = _option(
        3, "Channels of synthetic images, a count.", minimum=1
    )
    synthetic_classes: int = _option(
        10, "Classes of the synthetic data set, a count.", minimum=2
    )
    synthetic_examples: int = _option(
        10000, "Training examples of the synthetic data set, a count.", minimum=1
    )
    augment: bool = _option(
        True,
        "Augments training images: pad, crop at random, and flip where a mirrored "
        "image keeps its class.",
    )
    image_size: int = _option(
        224,
        "Height and width that the images of images and tfrecord get, in pixels.",
        minimum=1,
    )
    augment_photos: bool = _option(
        False,
        "For images and tfrecord: trains on crops of random area and aspect, mirrored "
        "at random, and evaluates on the centre.",
    )
    test_share: float = _option(
        0.1,
        "Share of an image folder without test/ that is the test split.",
        above=0.0,
        below=1.0,
    )
    max_bad_examples: int = _option(
        0,
        "Examples of images and tfrecord that may be left out, with a line each, since "
        "they cannot be used; one more is an error. A count.",
        minimum=0,
    )
    record_image: str = _option(
        choices.RECORD_IMAGE, "Feature of the encoded image in a record."
    )
    record_label: str = _option(
        choices.RECORD_LABEL, "Feature of the label in a record."
    )
    label_offset: int = _option(
        0, "Label of the first class in records, such as 1.", minimum=0
    )
    record_classes: int = _option(
        0,
        "Classes of records, a count; 0 takes those of the labels.txt beside them.",
        minimum=0,
    )

    model: str = _option("convnet", "Network to train.", choices=tuple(NETWORKS))
    resnet_n: int = _option(
        3, "Residual blocks per stage of resnet, which has 6n+2 layers.", minimum=1
    )
    precision: str = _option(
        "float32",
        "Precision of the activations; weights, statistics and loss stay float32. "
        "bfloat16 needs TensorFlow 2, and gains speed on processors with instructions "
        "for it only.",
        choices=("float32", "bfloat16"),
    )
    data_format: str = _option(
        "NHWC",
        f"Order of the axes in training, for {', '.join(CHANNELS_FIRST)}: channels "
        "last, or first, which may be faster on a GPU. Checkpoints are the same.",
        choices=("NHWC", "NCHW"),
    )
    scale_features: bool = _option(
        True,
        "Brings what enters the logits of convnet and mlp to a size that does not depend "
        "on the image's, so that one learning rate holds for all.",
    )
    normalization: str = _option(
        "batch", "Normalization before each nonlinearity.", choices=("batch", "none")
    )
    bn_decay: float = _option(
        0.95,
        "Share of the moving statistics that one step keeps; after n steps their "
        "initial values still weigh decay^n. cumulative: the mean of those of all steps.",
        minimum=0.0,
        below=1.0,
        words=(CUMULATIVE,),
    )
    bn_decay_warm_up: bool = _option(
        False,
        "Begins with a lower --bn_decay: (1 + n) / (10 + n) after n steps, while that is "
        "less.",
    )
    bn_epsilon: float = _option(
        None,
        "Added to the variance, in its unit; by default 0.001, and 1e-05 for slim's "
        "ResNets.",
        kind=float,
        above=0.0,
    )
    bn_kernel: str = _option(
        "auto",
        "What computes batch norm in training: the fastest, one fused operation, several "
        "closer to float64, one that `python -m bn_tf1 build` has compiled, or the recipe "
        "that articles draw.",
        choices=("auto", "fused", "composed", "compiled", "recipe"),
    )
    bn_weight_decay: bool = _option(
        False, "Applies --weight_decay to gamma and beta too."
    )

    batch_size: int = _option(
        64,
        "Images of a batch: those of a training step but for --accumulate_steps.",
        minimum=2,
    )
    accumulate_steps: int = _option(
        1,
        "Batches whose gradients are averaged for one training step, a count: a step then "
        "sees so many times --batch_size images, in the memory of one batch. Each is "
        "normalised by itself; the moving statistics follow all of them together.",
        minimum=1,
    )
    max_steps: int = _option(
        1000, "Training step at which the run ends, a count.", minimum=1
    )
    learning_rate: float = _option(
        None,
        "Learning rate at the start, per step; by default that of the model: "
        + ", ".join(f"{n.learning_rate} for {name}" for name, n in NETWORKS.items())
        + ".",
        kind=float,
        above=0.0,
    )
    init_checkpoint: str = _option(
        "",
        "Checkpoint of the same network, of slim or of a run of train.py, that a new run "
        "begins with.",
    )
    init_exclude: str = _option(
        "",
        "Scopes that are not taken from --init_checkpoint, separated by commas, such as "
        "the logits for other classes.",
    )
    train_only: str = _option(
        "",
        "Scopes whose variables are trained, separated by commas; all by default.",
    )
    bn_normalize_with: str = _option(
        "batch",
        "Statistics that training normalises with: those of the batch, or the moving "
        "ones, which then stay as they are.",
        choices=("batch", "moving"),
    )
    bn_update: bool = _option(True, "Updates the moving statistics in training.")
    sync_batch_norm: bool = _option(
        True, "With several workers, the statistics of a batch are those of all of it."
    )
    bn_train_affine: bool = _option(True, "Trains gamma and beta.")

    lr_schedule: str = _option(
        "cosine",
        "Learning rate over the run: constant; cosine falls to 0 at --max_steps; step "
        "divides by 10 at 1/2 and at 3/4 of it.",
        choices=("constant", "cosine", "step"),
    )
    momentum: float = _option(
        0.9, "Momentum of the optimizer, a share.", minimum=0.0, below=1.0
    )
    weight_decay: float = _option(
        1e-4, "Factor of the L2 penalty sum(w^2)/2 on the weights.", minimum=0.0
    )
    weight_ema_decay: float = _option(
        0.0,
        "Decay of the averages of the weights that are kept beside them, for eval.py "
        "--weight_ema; at step n at most (1 + n) / (10 + n). 0 keeps none.",
        minimum=0.0,
        below=1.0,
    )
    seed: int = _option(
        0,
        "Seed of the initial weights, the order of examples and the augmentation.",
        minimum=0,
        below=2**31,
    )

    model_dir: str = _option(
        "runs/default", "Folder of checkpoints, summaries and config.json."
    )
    keep_memory: bool = _option(
        True,
        "Keeps freed memory in the process: faster steps, which would map it anew each "
        "time, for a larger process.",
    )
    save_checkpoint_steps: int = _option(
        200, "Steps between two checkpoints, a count.", minimum=1
    )
    keep_checkpoint_max: int = _option(
        5, "Newest checkpoints to keep, a count; 0 keeps all.", minimum=0
    )
    grace_secs: float = _option(
        30.0,
        "Seconds from SIGTERM or SIGINT until the run is ended without saving, if its "
        "step and checkpoint are not done before.",
        minimum=0.0,
        below=1e9,
    )
    summary_steps: int = _option(
        100, "Steps between two TensorBoard summaries, a count.", minimum=1
    )
    log_steps: int = _option(100, "Steps between two log lines, a count.", minimum=1)

    def __post_init__(self):
        # What is none is refused below; a config.json may have a list there.
        network = NETWORKS.get(self.model) if isinstance(self.model, str) else None
        for option, of_network in _OF_THE_MODEL.items():
            if getattr(self, option) is None and network is not None:
                # Frozen for others: config.json shall hold what was trained with, and not
                # what another version's default would be.
                object.__setattr__(self, option, getattr(network, of_network))
        for field in dataclasses.fields(self):
            _check_range(field, getattr(self, field.name))
        if self.precision == "bfloat16":
            _check_bfloat16()
        if self.data_format == "NCHW" and self.model not in CHANNELS_FIRST:
            raise ConfigError(
                f"--data_format is 'NCHW', but --model={self.model} has channels last "
                f"only: leave it out, or take one of {', '.join(CHANNELS_FIRST)}"
            )
        self._check_decay()
        # An empty name is what a shell makes of a variable that is not set.
        if not self.model_dir:
            raise ConfigError("--model_dir is '', but must be the name of a folder")
        if not re.fullmatch("([0-9a-f]{64})?", self.data_checksum):
            raise ConfigError(
                f"--data_checksum is {self.data_checksum!r}, but must be a SHA-256: 64 "
                "digits of 0-9 and a-f"
            )

    def _check_decay(self):
        is_cumulative = self.bn_decay == CUMULATIVE
        if is_cumulative and self.bn_decay_warm_up:
            raise ConfigError(
                "--bn_decay is 'cumulative' and --bn_decay_warm_up is on, but the mean of "
                "all steps needs none: leave one of them out"
            )
        if (is_cumulative or self.bn_decay_warm_up) and self.bn_kernel == "recipe":
            raise ConfigError(
                "--bn_kernel is 'recipe', which has one decay for all steps: give "
                "--bn_decay a number, without --bn_decay_warm_up, or take another kernel"
            )


def _check_bfloat16():
    from tensorflow.compat.v1 import version  # not before it is asked for: --help

    if version.VERSION.startswith("1."):
        raise ConfigError(
            f"--precision is 'bfloat16', but TensorFlow {version.VERSION} has no "
            "convolution for it on the CPU: use TensorFlow 2, or float32"
        )


# The groups of the options in --help, by the option that each begins with.
_GROUPS = {
    "data_dir": "data",
    "model": "model",
    "normalization": "batch norm",
    "batch_size": "optimisation",
    "model_dir": "run",
}

_OF_BATCH_NORM = tuple(
    field.name
    for field in dataclasses.fields(Config)
    if field.name.startswith("bn_") or field.name == "sync_batch_norm"
)
# Options that do nothing unless another one has one of some values; None stands for all
# but that which turns it off, such as 0 or "".
_ACT_ONLY_WITH = (
    (("data_dir",), "dataset", tuple(d for d in DATASETS if d != "synthetic")),
    (
        ("synthetic_size", "synthetic_channels")
        + ("synthetic_classes", "synthetic_examples"),
        "dataset",
        ("synthetic",),
    ),
    (("image_size", "augment_photos", "max_bad_examples"), "dataset", STREAMED),
    (("test_share",), "dataset", ("images",)),
    (
        ("record_image", "record_label", "label_offset", "record_classes"),
        "dataset",
        ("tfrecord",),
    ),
    (("resnet_n",), "model", ("resnet",)),
    (("scale_features",), "model", ("convnet", "mlp")),
    (_OF_BATCH_NORM, "normalization", ("batch",)),
    # Moving statistics that training normalises with stand still, whatever is asked.
    (("bn_decay", "bn_update"), "bn_normalize_with", ("batch",)),
    (("bn_weight_decay",), "weight_decay", None),
    (("init_exclude",), "init_checkpoint", None),
)

# What a config.json means that was written before there was such an option: the network
# that it trained has its checkpoints.
_MEANT_BEFORE = {"scale_features": False}

# What may differ when a run is resumed: nothing that the trained weights depend on,
# except how long the training goes on.
CHANGEABLE = frozenset(
    {
        "model_dir",
        "data_dir",
        "max_steps",
        "keep_memory",
        "save_checkpoint_steps",
        "keep_checkpoint_max",
        "grace_secs",
        "max_bad_examples",
        "summary_steps",
        "log_steps",
    }
)


# What may differ between the workers of one run.
_OF_EACH_WORKER = ("model_dir", "data_dir", "keep_memory", "grace_secs")


def groups() -> dict[str, str]:
    """The group in which --help lists an option, by its name."""
    found, group = {}, ""
    for field in dataclasses.fields(Config):
        found[field.name] = group = _GROUPS.get(field.name, group)
    return found


def resolve(given: Mapping[str, Any]) -> Config:
    """The configuration of a run from the options that were given for it.

    Args:
        given: value by name of the options that the user set, without the defaults.

    Returns:
        The given values over those of an earlier run in the same model directory, if
        there was one, over the defaults.

    Raises:
        ConfigError: a value is out of range, differs from the earlier run's, or is of an
            option that does nothing beside the others, such as the size of synthetic
            images where the data set has its own.
    """
    config = Config(**given)
    check_folder("model_dir", config.model_dir)
    path = os.path.join(config.model_dir, CONFIG_FILE)
    if os.path.exists(path):
        saved = load(config.model_dir)
        for name, value in given.items():
            before = getattr(saved, name)
            if name not in CHANGEABLE and value != before:
                raise ConfigError(
                    f"--{name} is {value!r}, but the run in {config.model_dir} was "
                    f"started with {before!r} ({path}); leave the flag out to resume that "
                    "run, or choose another --model_dir for a new one"
                )
        config = dataclasses.replace(saved, **{**given, "model_dir": config.model_dir})
    # Of the whole: what another option is may stand in the file.
    _check_that_they_act(config, given)
    return config


def _check_that_they_act(config, given):
    """Refuses an option that was given, but does nothing beside the others."""
    for names, other, values in _ACT_ONLY_WITH:
        found = getattr(config, other)
        if found in values if values else found:
            continue
        needed = " or ".join(f"--{other}={value}" for value in values or ("...",))
        for name in given.keys() & set(names):
            raise ConfigError(
                f"--{name} is {given[name]!r}, but does nothing without {needed}, and "
                f"--{other} is {found!r}: leave out --{name}, or change --{other}"
            )


def check_folder(name: str, path: str) -> None:
    """Refuses a folder that cannot be there, since a file is in its place.

    Raises:
        ConfigError: `path` is a file, or is inside of one; `name` is its option.
    """
    # Here, in words: os.makedirs says "File exists" or "Not a directory".
    place = path
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if place and not os.path.isdir(place):
        what = "which" if place == path else f"where {place}"
        kind = "a file" if os.path.exists(place) else "a link to nothing"
        raise ConfigError(
            f"--{name} is {path!r}, {what} is {kind}, but must be a folder, or the name "
            "of a new one"
        )


def load(model_dir: str) -> Config:
    """Reads the configuration that a training run saved in `model_dir`.

    Raises:
        ConfigError: there is none, or the file is not such a configuration.
    """
    path = os.path.join(model_dir, CONFIG_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            values = _known_options(json.load(file))
        return Config(**{**_MEANT_BEFORE, **values, "model_dir": model_dir})
    except FileNotFoundError:
        raise ConfigError(
            f"--model_dir is {model_dir!r}, but there is no {path}: train.py writes it "
            "when a run begins"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path} is not a saved configuration: {error}; put a good copy back, or move "
            "the file away and give train.py the flags that the run began with: it writes "
            "the file anew"
        ) from error


def _known_options(values):
    """What a config.json holds, if it is options of this version."""
    if not isinstance(values, dict):
        raise TypeError(f"it holds a {type(values).__name__}, but must hold an object")
    # Passed over, an option of a later version would mean another run.
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"this version has no option {', '.join(unknown)}")
    return values


def save(config: Config) -> None:
    """Writes `config` to its model directory, replacing the file as a whole."""
    os.makedirs(config.model_dir, exist_ok=True)
    # A half-written one would keep the run from being resumed.
    path = os.path.join(config.model_dir, CONFIG_FILE)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    durable_files.replace_text(path, text)


def remove(model_dir: str) -> None:
    """Takes back what `save` wrote, if it came to that."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(model_dir, CONFIG_FILE))


def as_chosen(config: Config, chosen: Mapping[str, Any]) -> Config:
    """The configuration of a worker: the chief's, but for what each has for itself.

    Args:
        config: what this worker was started with.
        chosen: the fields of the chief's.

    Raises:
        ConfigError: this worker was started with something else than the chief.
    """
    # The chief alone sees the config.json of a run that is resumed.
    own = {name: getattr(config, name) for name in _OF_EACH_WORKER}
    result = Config(**{**chosen, **own})
    for field in dataclasses.fields(Config):
        # What was left at its default was not asked for: the chief may have another.
        value = getattr(config, field.name)
        if value not in (field.default, getattr(result, field.name)):
            raise ConfigError(
                f"--{field.name} is {value!r}, but the chief has "
                f"{getattr(result, field.name)!r}: give all workers the same flags"
            )
    return result


def check_checksum(config: Config, checksum: str) -> None:
    """Raises DataFileError if a worker's data are not the chief's."""
    if config.data_checksum != checksum:
        others = f"those of the chief {config.data_checksum or 'of no file'}"
        raise _other_data(config, checksum, f"{others}: give all workers the same")


def with_checksum(config: Config, checksum: str) -> Config:
    """`config` with the checksum of the data that lie there now.

    Raises:
        DataFileError: it is not the one in `config` or in the saved configuration.
        ConfigError: the saved file is not a configuration.
    """
    path = os.path.join(config.model_dir, CONFIG_FILE)
    expected = config.data_checksum
    # --data_dir may change, for data are moved; what is in them may not.
    if not expected and os.path.exists(path):
        expected = load(config.model_dir).data_checksum
    if expected and expected != checksum:
        raise _other_data(
            config,
            checksum,
            f"those of the run in {config.model_dir} have {expected} ({path}, "
            "--data_checksum): put them back, or choose another --model_dir for a run on "
            "the new data",
        )
    return dataclasses.replace(config, data_checksum=checksum)


def _other_data(config, checksum, others):
    return DataFileError(
        f"{config.data_dir or config.dataset}: the data have the checksum "
        f"{checksum or 'of no file'}, but {others}"
    )


def _check_range(field, value):
    limits = field.metadata
    if limits["words"] and value in limits["words"]:
        return
    wanted = limits["kind"]
    # A bool is an int to Python, and to nobody who writes --batch_size=True.
    allowed = (int, float) if wanted is float else wanted
    if not isinstance(value, allowed) or (wanted is int and isinstance(value, bool)):
        what = " or ".join((f"of type {wanted.__name__}", *limits["words"]))
        raise ConfigError(f"--{field.name} is {value!r}, but must be {what}")
    if limits["choices"] is not None and value not in limits["choices"]:
        choices = ", ".join(limits["choices"])
        raise ConfigError(f"--{field.name} is {value!r}, but must be one of {choices}")
    _check_bounds(field, value, repr(value))
    if wanted is float:
        # What TensorFlow makes of it: 1e-60 is 0 there, and 1e39 is infinite.
        with np.errstate(over="ignore"):
            single = float(np.float32(value))
        _check_bounds(field, single, f"{value!r}, in float32 {single!r}")


def _check_bounds(field, value, shown):
    limits = field.metadata
    # Written so that NaN fails each comparison.
    for key, holds, words in (
        ("minimum", lambda bound: value >= bound, "at least"),
        ("above", lambda bound: value > bound, "greater than"),
        ("below", lambda bound: value < bound, "less than"),
    ):
        bound = limits[key]
        if bound is not None and not holds(bound):
            raise ConfigError(
                f"--{field.name} is {shown}, but must be {words} {bound!r}"
            )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{field.name} is {shown}, but must be finite")
