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
    for scope in scopes:
        if not any(_is_in(variable.op.name, [scope]) for variable in variables):
            raise ConfigError(
                f"--train_only has {scope!r}, but no trainable variable is in that scope; "
                f"there are {', '.join(_top_scopes(variables))}"
            )
    return [v for v in variables if _is_in(v.op.name, scopes)]


def initialise(session: tf.Session, config: Config) -> None:
    """Gives the variables of the network the values of `--init_checkpoint`.

    Says on standard error what was restored and what was not.

    Raises:
        ConfigError: the checkpoint cannot be read, lacks moving statistics, has a
            variable in another shape, or has none of the network's.
    """
    excluded = _scopes(config.init_exclude)
    network = [v for v in _variables() if not _is_in(v.op.name, excluded)]
    try:
        report = bn_tf1.restore(session, config.init_checkpoint, variables=network)
    except ValueError as error:
        raise ConfigError(
            f"--init_checkpoint is {config.init_checkpoint!r}: {error}; scopes that shall "
            "start anew are named by --init_exclude"
        ) from error
    if not report.restored:
        raise ConfigError(
            f"--init_checkpoint is {config.init_checkpoint!r}, which has no variable of "
            f"--model={config.model}; it has {', '.join(report.unused[:5])}, ..."
        )
    print(_table(report, excluded, config), file=sys.stderr)


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
    return sorted({variable.op.name.split("/")[0] for variable in variables})
