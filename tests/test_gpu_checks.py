"""The checks for people with a GPU: that they run, on the CPU, and that they find something."""

import pytest
import tensorflow.compat.v1 as tf

import bn_tf1
from tests import gpu_checks


def test_the_dry_run_passes(capsys):
    assert gpu_checks.main(["--dry_run"]) == 0
    said = capsys.readouterr().out
    count = len(gpu_checks.CASES) + 1
    assert said.count("\nok ") == count and "WRONG" not in said
    assert f"{count} of {count} checks passed" in said
    assert "of the raw kernel's" in said


def test_without_a_gpu_it_says_so_and_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(
        tf.config.experimental, "list_physical_devices", lambda kind: []
    )
    assert gpu_checks.main([]) == gpu_checks.NO_GPU
    assert "TensorFlow sees no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, what",
    [
        ({"epsilon": 2e-3, "decay": 0.9}, "y is off by"),
        ({"epsilon": 1e-3, "decay": 0.8}, "moving mean is off by"),
    ],
)
def test_a_layer_that_is_wrong_is_found(options, what, monkeypatch):
    def wrong(x, mode, axis, _):
        return bn_tf1.batch_norm(x, mode, axis=axis, **options)

    monkeypatch.setitem(gpu_checks.MAKERS, "batch_norm", wrong)
    case = gpu_checks.Case("batch_norm")
    with pytest.raises(gpu_checks.Wrong, match=what):
        gpu_checks._check_layer(case, "/cpu:0", is_dry=True)
    with pytest.raises(gpu_checks.Wrong, match="operations are on the GPU"):
        gpu_checks._placed(_run_on_the_cpu(), "/gpu:0")


def _run_on_the_cpu():
    metadata = tf.RunMetadata()
    options = tf.RunOptions(output_partition_graphs=True)
    with tf.Session() as session:
        x = tf.placeholder_with_default(1.0, [])
        session.run(x + 1.0, options=options, run_metadata=metadata)
    return metadata
