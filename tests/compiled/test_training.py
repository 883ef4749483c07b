"""train.py --bn_kernel=compiled."""

import json

import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.compiled import library
from bn_tf1.jobs import diagnosis
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.jobs.evaluation import Request, evaluate
from bn_tf1.jobs.finished.recalibrated_runs import recalibrate_run
from bn_tf1.jobs.training import train


def _config(folder):
    return Config(
        model_dir=str(folder / "run"),
        model="mlp",
        batch_size=16,
        max_steps=2,
        bn_kernel="compiled",
    )


def test_without_it_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        ConfigError, match="--bn_kernel is 'compiled', but .*bn_tf1 build"
    ):
        train(_config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_it_and_eval_needs_none_of_it(cache, tmp_path, monkeypatch):
    config = _config(tmp_path)
    train(config)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["bn_kernel"] == "compiled"
    meta = tf.MetaGraphDef.FromString((tmp_path / "run/model.ckpt-2.meta").read_bytes())
    assert any("Compiled" in node.op for node in meta.graph_def.node)
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (result,) = evaluate(Request(config.model_dir, run_once=True))
    assert result.step == 2
    # With the statistics of the batch, too.
    diagnosis.diagnose(config.model_dir, str(tmp_path / "run" / "model.ckpt-2"))
    recalibrate_run(config.model_dir, str(tmp_path / "recalibrated"), num_examples=256)
