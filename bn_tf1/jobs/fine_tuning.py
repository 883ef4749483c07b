"""A run that begins with the weights of another one, and what of them it trains.

Contract: every variable of the network comes from `--init_checkpoint` or is named as not
restored; moving statistics that it lacks are an error, unless their scope is excluded. The
checkpoint is slim's, or of a run of train.py, of the same network: the names are the same.
A checkpoint of another library is translated first, by `python -m bn_tf1 convert`.
"""

from __future__ import annotations

import sys
from typing import Any, Sequence

import tensorflow.compat.v1 as tf

import bn_tf1
from bn_tf1.jobs.config import Config, ConfigError


def trained_variables(config: Config) -> Sequence[Any] | None:
    """The variables of `--train_only`, or None for all that are trainable.

    Raises:
        ConfigError: a scope has none.
    """
    scopes = _scopes(config.train_only)
    if not scopes:
        return None
    variables = tf.trainable_variables()
    _check_scopes("train_only", scopes, variables, "no trainable variable")
    return [v for v in variables if _is_in(v.op.name, scopes)]


def initialise(session: tf.Session, config: Config) -> None:
    """Gives the variables of the network the values of `--init_checkpoint`.

    Says on standard error what was restored and what was not.

    Raises:
        ConfigError: the checkpoint cannot be read, lacks moving statistics, has a
            variable in another shape, or has none of the network's; or a scope of
            `--init_exclude` has none of them.
    """
    # All that is refused is refused before a value is assigned, or a run is begun.
    excluded = _scopes(config.init_exclude)
    _check_scopes("init_exclude", excluded, _variables(), "no variable of the network")
    network = [v for v in _variables() if not _is_in(v.op.name, excluded)]
    if not network:
        raise ConfigError(
            f"--init_exclude is {config.init_exclude!r}, which leaves nothing to take from "
            "--init_checkpoint: leave both out"
        )
    every = ["*"]  # what is refused of them is said below, in terms of the flags
    try:
        report = bn_tf1.restore(
            session,
            config.init_checkpoint,
            variables=network,
            allow_missing=every,
            allow_wrong_shape=every,
        )
    except ValueError as error:
        raise ConfigError(
            f"--init_checkpoint is {config.init_checkpoint!r}: {error}"
        ) from error
    # A checkpoint of another network has other names, and would restore nothing.
    if not report.restored:
        raise ConfigError(
            f"--init_checkpoint is {config.init_checkpoint!r}, which has no variable of "
            f"--model={config.model}; it has {', '.join(report.unused[:5])}, ..."
        )
    _check_fit(report, config)
    print(_table(report, excluded, config), file=sys.stderr)


def _check_fit(report, config):
    statistics = {
        variable.op.name
        for call in bn_tf1.batch_norm_calls()
        for variable in (call.moving_mean, call.moving_variance)
    }
    lacking = [name for name in report.missing if name in statistics]
    # Weights that are missing are begun anew, and told: who fine-tunes has other logits. Of
    # statistics nobody would notice, until evaluation.
    what = ""
    if lacking:
        what = f"lacks the moving statistics {', '.join(lacking[:5])}"
        what += f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    elif report.wrong_shape:
        wrong = report.wrong_shape[0]
        what = f"has {wrong.name} of shape {list(wrong.checkpoint_shape)}, but "
        what += f"--model={config.model} of shape {list(wrong.variable_shape)}"
    if what:
        raise ConfigError(
            f"--init_checkpoint is {config.init_checkpoint!r}, which {what}: name scopes "
            "that shall start anew by --init_exclude, give the --model that it is of, or "
            "translate that of another library by `python -m bn_tf1 convert`"
        )


def _check_scopes(option, scopes, variables, nothing):
    for scope in scopes:
        if not any(_is_in(variable.op.name, [scope]) for variable in variables):
            raise ConfigError(
                f"--{option} has {scope!r}, but {nothing} is in that scope; there are "
                f"{', '.join(_top_scopes(variables))}"
            )


def _variables():
    """Those of the network: neither the slots of the optimizer nor the step."""
    found = list(tf.trainable_variables())
    for call in bn_tf1.batch_norm_calls():
        found += [call.moving_mean, call.moving_variance, call.gamma, call.beta]
    return list({v.op.name: v for v in found if v is not None}.values())


def _table(report, excluded, config):
    rows = [("from", config.init_checkpoint), ("restored", str(len(report.restored)))]
    if report.missing:
        rows.append(("not in it, begun anew", ", ".join(report.missing)))
    if excluded:
        rows.append(("excluded, begun anew", ", ".join(excluded)))
    return "\n".join(f"  {what:<24}{names}" for what, names in rows)


def _scopes(text):
    return [scope.strip().strip("/") for scope in text.split(",") if scope.strip(" /")]


def _is_in(name, scopes):
    return any(name == scope or name.startswith(scope + "/") for scope in scopes)


def _top_scopes(variables):
    # The first part of a name only: a ResNet has 161 variables.
    return sorted({variable.op.name.split("/")[0] for variable in variables})
