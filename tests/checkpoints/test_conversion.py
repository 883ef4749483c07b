"""`convert`: every pair of dialects there and back, matching, and what it refuses."""

import os
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from bn_tf1.checkpoints import reader_writer
from bn_tf1.checkpoints.conversion import ConversionError, Row, convert
from bn_tf1.checkpoints.dialects import DIALECTS
from bn_tf1.checkpoints.reader_writer import CheckpointError, open_checkpoint
from tests import FIXTURES

DIALECT_OF = {
    "tf_layers": "tf_layers",
    "contrib": "slim",
    "tf_slim": "slim",
    "sonnet": "sonnet",
    "sonnet_v2": "sonnet_v2",
    "tensorpack": "tensorpack",
    "keras": "keras",
}
LEAVES = ("gamma", "beta", "moving_mean", "moving_variance")


def fixture(origin):
    return str(FIXTURES / origin / "model.ckpt")


def save(prefix, values):
    """Writes a checkpoint with `values`, arrays by name."""
    with tf.Graph().as_default(), tf.Session() as session:
        names = sorted(values)
        session.run(
            tf.raw_ops.SaveV2(
                prefix=str(prefix),
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[tf.constant(values[name]) for name in names],
            )
        )
    return str(prefix)


def contents(prefix):
    """{name: (dtype, shape, bits)} of a checkpoint."""
    checkpoint = open_checkpoint(prefix)
    values = {}
    for name in checkpoint.shapes:
        value = checkpoint.read(name)
        bits = value.tolist() if value.dtype == object else value.tobytes()
        values[name] = (checkpoint.dtypes[name], value.shape, bits)
    return values


def bn_layer(scope, channels=3, leaves=LEAVES, shape=None):
    """Variables of a layer with distinct values, moving statistics and slots."""
    random = np.random.RandomState(sum(map(ord, scope)))
    shape = [channels] if shape is None else shape
    return {
        scope + "/" + leaf: random.uniform(1, 2, shape).astype(np.float32)
        for leaf in leaves
    }


def complete(dialect):
    """A checkpoint's values with all that any dialect can hold, named by `dialect`."""
    leaves = DIALECTS[dialect].leaves
    shape = [1, 1, 1, 5] if dialect == "sonnet" else [5]
    others = {
        "conv/kernel": np.array([[np.nan, np.inf], [-0.0, 1e-45]], np.float32),
        "conv/kernel/Momentum": np.ones([2, 2], np.float32),
        "global_step": np.int64(7),
        "vocabulary": np.array([b"a", b"", b"\xff"], object),
        "beta1_power": np.float64(0.9),
        "mask": np.array([True, False]),
    }
    # A NaN with a payload: bits, not values, have to survive.
    others["conv/kernel"].view(np.uint32)[0, 0] = 0x7FC00123
    for scope in ("a/bn", "a/bn_1"):
        values = bn_layer(scope, shape=shape, leaves=leaves.values())
        slots = ["{}/Momentum", "{}/Adam_1", "training/Adam/{}/m"]
        for role in ("gamma", "beta"):
            name = scope + "/" + leaves[role]
            for i, slot in enumerate(slots):
                values[slot.format(name)] = values[name] * (i + 2)
        others.update(values)
    return others


# ------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("there", sorted(DIALECTS))
@pytest.mark.parametrize("here", sorted(DIALECTS))
def test_there_and_back_is_bit_exact(here, there, tmp_path):
    source = save(tmp_path / "source", complete(here))
    shapes = {d: "1,1,1,C" if d == "sonnet" else None for d in (here, there)}
    middle, back = str(tmp_path / "middle"), str(tmp_path / "back")
    convert(source, middle, from_dialect=here, to_dialect=there, shape=shapes[there])
    assert contents(middle) == contents(save(tmp_path / "expected", complete(there)))
    convert(middle, back, from_dialect=there, to_dialect=here, shape=shapes[here])
    assert contents(back) == contents(source)


@pytest.mark.parametrize("there", ["tf_layers", "sonnet", "tensorpack"])
@pytest.mark.parametrize("origin", sorted(DIALECT_OF))
def test_there_and_back_for_every_origin(origin, there, tmp_path):
    source, here = fixture(origin), DIALECT_OF[origin]
    middle, back = str(tmp_path / "middle"), str(tmp_path / "back")
    shape = "1,1,C" if there == "sonnet" else None
    convert(source, middle, from_dialect=here, to_dialect=there, shape=shape)
    # The original also tells which layer has no gamma, and the shapes of Sonnet.
    convert(middle, back, from_dialect=there, to_dialect=here, like=source)
    assert contents(back) == contents(source)


def test_there_and_back_with_like_a_graph(tmp_path):
    meta = fixture("sonnet") + ".meta"
    middle, back = str(tmp_path / "middle"), str(tmp_path / "back")
    convert(fixture("sonnet"), middle, from_dialect="sonnet", to_dialect="bn_tf1")
    convert(middle, back, from_dialect="bn_tf1", to_dialect="sonnet", like=meta)
    assert contents(back) == contents(fixture("sonnet"))


def test_renormalization_and_zero_debias_move_along(tmp_path):
    values = bn_layer("BatchNorm")
    values["BatchNorm/renorm_mean"] = values["BatchNorm/gamma"] + 1
    values["BatchNorm/BatchNorm/moving_mean/biased"] = values["BatchNorm/beta"] + 1
    values["BatchNorm/BatchNorm/moving_mean/local_step"] = np.float32(3)
    source = save(tmp_path / "source", values)
    result = str(tmp_path / "result")
    convert(
        source,
        result,
        from_dialect="slim",
        to_dialect="bn_tf1",
        name_map={"BatchNorm": "x/bn"},
    )
    renamed = {name.replace("BatchNorm", "x/bn"): v for name, v in values.items()}
    assert contents(result) == contents(save(tmp_path / "expected", renamed))


# ---------------------------------------------------------------------- what passes through


def test_partitioned_variables_bfloat16_and_iterators(tmp_path):
    dataset = tf.data.Dataset.range(10)
    iterator = tf.data.make_initializable_iterator(dataset)
    following = iterator.get_next()
    tf.add_to_collection(
        tf.GraphKeys.SAVEABLE_OBJECTS,
        tf.data.experimental.make_saveable_from_iterator(iterator),
    )
    partitioner = tf.fixed_size_partitioner(2)
    tf.get_variable("kernel", [4, 2], partitioner=partitioner)
    tf.get_variable("half", [3], tf.bfloat16, tf.ones_initializer())
    for name, value in bn_layer("bn").items():
        tf.get_variable(name, initializer=value)
    result = str(tmp_path / "result")
    with tf.Session() as session:
        session.run([tf.global_variables_initializer(), iterator.initializer])
        session.run(following)
        saver = tf.train.Saver()
        source = saver.save(session, str(tmp_path / "source"))
        kernel = session.run(tf.global_variables("kernel"))
        session.run(following)
        convert(source, result, from_dialect="tf_layers", to_dialect="tensorpack")
        assert open_checkpoint(result).dtypes["half"] == tf.bfloat16
        read = open_checkpoint(result).read("kernel")
        np.testing.assert_array_equal(read, np.concatenate(kernel))
        back = str(tmp_path / "back")
        convert(result, back, from_dialect="tensorpack", to_dialect="tf_layers")
        saver.restore(session, back)
        assert session.run(following) == 1


def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_writer, "_SHARD_BYTES", 64)
    source = save(tmp_path / "source", complete("tf_layers"))
    result = str(tmp_path / "result")
    convert(source, result, from_dialect="tf_layers", to_dialect="slim")
    assert contents(result) == contents(source)
    assert len(list(tmp_path.glob("result.data-*"))) > 5
    assert not list(tmp_path.glob("result.part*"))


def test_a_directory_and_a_checkpoint_of_the_first_format(tmp_path):
    for name, value in bn_layer("bn").items():
        tf.get_variable(name, initializer=value)
    saver = tf.train.Saver(write_version=tf.train.SaverDef.V1)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver.save(session, str(tmp_path / "source"))
    conversion = convert(
        str(tmp_path),
        str(tmp_path / "result"),
        from_dialect="tf_layers",
        to_dialect="tensorpack",
    )
    assert Row("bn/moving_mean", "bn/mean/EMA", (3,)) in conversion.rows


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path):
    conversion = convert(
        fixture("sonnet"),
        str(tmp_path / "result"),
        from_dialect="sonnet",
        to_dialect="tensorpack",
        dry_run=True,
    )
    lines = [line.split() for line in str(conversion).splitlines()]
    assert lines[0] == ["old", "name", "new", "name", "shape", "note"]
    moved = "batch_norm_1/moving_mean batch_norm_1/mean/EMA [6] reshaped from [1, 6]"
    assert moved.split() in lines
    assert ["-", "batch_norm_1/gamma", "[6]", "filled", "with", "1"] in lines
    assert ["conv/kernel", "conv/kernel", "[3,", "3,", "1,", "4]"] in lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dialect, filled",
    [
        ("tf_layers", {"bn/gamma": 1.0, "bn/beta": 0.0}),
        ("tensorpack", {"bn/gamma": 1.0, "bn/beta": 0.0}),
        ("slim", {"bn/beta": 0.0}),
    ],
)
def test_missing_gamma_and_beta(dialect, filled, tmp_path):
    values = bn_layer("bn", leaves=("moving_mean", "moving_variance"))
    values = {name: v.astype(np.float64) for name, v in values.items()}
    source, result = save(tmp_path / "source", values), str(tmp_path / "result")
    convert(source, result, from_dialect="slim", to_dialect=dialect)
    checkpoint = open_checkpoint(result)
    assert len(checkpoint.shapes) == 2 + len(filled)
    for name, value in filled.items():
        np.testing.assert_array_equal(checkpoint.read(name), np.full([3], value))
        assert checkpoint.dtypes[name] == tf.float64


def test_drop(tmp_path):
    values = dict(bn_layer("bn"), **{"bn/bn/moving_mean/biased": np.ones(3, "f")})
    source, result = save(tmp_path / "source", values), str(tmp_path / "result")
    conversion = convert(
        source,
        result,
        from_dialect="slim",
        to_dialect="tf_layers",
        drop=["*/biased"],
    )
    assert set(open_checkpoint(result).shapes) == set(bn_layer("bn"))
    assert "left out: in `drop`" in str(conversion)


# ---------------------------------------------------------------------------------- matching


def same_dialect(source, result, **options):
    dialects = {"from_dialect": "tf_layers", "to_dialect": "tf_layers"}
    return convert(source, result, **{**dialects, **options})


def layers_named(*scopes, channels=None):
    values = {"conv_4/kernel": np.ones([2], np.float32)}
    for i, scope in enumerate(scopes):
        values.update(bn_layer(scope, (channels or [3] * len(scopes))[i]))
    return values


def new_scopes(conversion):
    leaf = "/moving_mean"
    return {
        row.old[: -len(leaf)]: row.new[: -len(leaf)]
        for row in conversion.rows
        if row.old is not None and row.old.endswith(leaf)
    }


def match(
    tmp_path, sources, targets, *, name_map=None, channels=None, like_channels=None
):
    source = save(tmp_path / "source", layers_named(*sources, channels=channels))
    targets = layers_named(*targets, channels=like_channels or channels)
    like = save(tmp_path / "like", targets)
    result = str(tmp_path / "result")
    return same_dialect(source, result, like=like, name_map=name_map)


@pytest.mark.parametrize(
    "sources, targets",
    [
        (["bn_3", "bn_4", "bn_10"], ["bn_5", "bn_6", "bn_12"]),
        (["bn", "bn_1"], ["bn_1", "bn_2"]),  # a name in both is not the same layer
        (["block_2/bn", "block_9/bn_1"], ["block/bn", "block_1/bn"]),
        (["bn", "other/bn"], ["bn", "other/bn"]),
    ],
)
def test_drifted_numbers_are_matched_by_order(sources, targets, tmp_path):
    conversion = match(tmp_path, sources, targets)
    assert new_scopes(conversion) == dict(zip(sources, targets))
    result = contents(str(tmp_path / "result"))
    before = contents(str(tmp_path / "source"))
    for old, new in zip(sources, targets):
        assert result[new + "/gamma"] == before[old + "/gamma"]
    assert "conv_4/kernel" in result


def test_another_scope_is_matched_by_its_channels(tmp_path):
    conversion = match(
        tmp_path,
        ["conv1/BatchNorm", "conv2/BatchNorm"],
        ["bn", "bn_1"],
        channels=[3, 4],
    )
    assert new_scopes(conversion) == {
        "conv1/BatchNorm": "bn",
        "conv2/BatchNorm": "bn_1",
    }


def test_the_map_settles_what_is_ambiguous(tmp_path):
    conversion = match(
        tmp_path,
        ["conv1/BatchNorm", "conv2/BatchNorm"],
        ["bn", "bn_1", "head/bn"],
        name_map={"conv1/BatchNorm": "bn_1", "conv2/BatchNorm": "bn"},
    )
    assert new_scopes(conversion) == {
        "conv1/BatchNorm": "bn_1",
        "conv2/BatchNorm": "bn",
    }
    assert conversion.unmatched == ("head/bn",)
    assert "not in the source: layer head/bn" in str(conversion)


def test_the_map_renames_variables_scopes_and_their_slots(tmp_path):
    values = {
        "net/conv/kernel": np.ones([2], np.float32),
        "net/conv/kernel/Momentum": np.ones([2], np.float32),
        "Adam/net/conv/kernel/m": np.ones([2], np.float32),
        "step": np.int64(1),
        **bn_layer("net/bn"),
    }
    source, result = save(tmp_path / "source", values), str(tmp_path / "result")
    same_dialect(source, result, name_map={"net": "model", "step": "global_step"})
    assert set(open_checkpoint(result).shapes) == {
        "model/conv/kernel",
        "model/conv/kernel/Momentum",
        "Adam/model/conv/kernel/m",
        "global_step",
        *bn_layer("model/bn"),
    }


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "sources, targets, options, message",
    [
        (
            ["bn", "bn_1"],
            ["bn", "bn_1", "bn_2"],
            {},
            r"2 layers .* with 3 layers .*bn_2",
        ),
        (["a/bn", "b/bn"], ["bn", "bn_1"], {}, r"'a/bn' .* candidates are .*'bn_1'"),
        (
            ["a/bn"],
            ["bn"],
            {"like_channels": [4]},
            r"no single counterpart .* candidates are \[\]",
        ),
        (
            ["bn", "bn_1"],
            ["bn_4", "bn_5"],
            {"channels": [3, 4], "like_channels": [4, 3]},
            r"3 channels.*'bn_4'.*has 4",
        ),
        (
            ["bn"],
            ["x"],
            {"like_channels": [4], "name_map": {"bn": "x"}},
            r"'bn' has 3 channels.*'x'",
        ),
    ],
)
def test_an_ambiguous_match_lists_candidates(
    sources, targets, options, message, tmp_path
):
    with pytest.raises(ConversionError, match=message):
        match(tmp_path, sources, targets, **options)
    assert not list(tmp_path.glob("result*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"from_dialect": "caffe"}, "`from_dialect` is 'caffe', but must be one of"),
        ({"to_dialect": "caffe"}, "`to_dialect` is 'caffe', but must be one of"),
        ({"shape": "1,C"}, "`shape` is '1,C', but is for `to_dialect` 'sonnet' only"),
        ({"to_dialect": "sonnet", "shape": "2,C"}, "must be 1s and one C"),
        ({"to_dialect": "sonnet"}, r"'bn' has shape \[3\].*give `shape`.* or `like`"),
        ({"from_dialect": "tensorpack"}, "no batch-norm layer of 'tensorpack', but of"),
        ({"name_map": {"nn": "x"}}, "`name_map` has 'nn', which is neither"),
        ({"name_map": {"bn": ""}}, "`name_map` maps 'bn' to an empty name"),
        ({"name_map": {"bn/gamma/Momentum": "x", "step": "x"}}, "would all be named x"),
        ({"drop": ["gamma"]}, "`drop` has 'gamma', which fits no name"),
        ({"like": fixture("tensorpack")}, "`like` .* has no batch-norm layer"),
        ({"like": "no.meta"}, "no.meta cannot be read: No such file"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    values = bn_layer("bn", leaves=LEAVES + ("gamma/Momentum",))
    source = save(tmp_path / "source", dict(values, step=np.int64(1)))
    with pytest.raises(ValueError, match=message):
        same_dialect(source, str(tmp_path / "result"), **options)
    assert not list(tmp_path.glob("result*"))


def test_state_that_the_target_cannot_hold(tmp_path):
    values = bn_layer("bn", leaves=LEAVES + ("renorm_mean", "renorm_stddev"))
    source = save(tmp_path / "source", values)
    with pytest.raises(
        ConversionError,
        match="cannot hold bn/renorm_mean, bn/renorm_stddev of .*`drop`",
    ):
        same_dialect(source, str(tmp_path / "result"), to_dialect="tensorpack")


@pytest.mark.parametrize("lost", ["bn/gamma", "bn/gamma/Momentum"])
def test_a_gamma_is_not_lost(lost, tmp_path):
    values = bn_layer("bn")
    like = bn_layer("bn", leaves=LEAVES[1:])
    if lost == "bn/gamma/Momentum":
        values["bn/gamma"][:] = 1
        values[lost] = np.zeros(3, np.float32)
    source = save(tmp_path / "source", values)
    like = save(tmp_path / "like", like)
    with pytest.raises(ConversionError, match=f"no gamma, so that .*{lost}.* lost"):
        same_dialect(source, str(tmp_path / "result"), like=like)


def test_no_layer_at_all(tmp_path):
    source = save(tmp_path / "source", {"kernel": np.ones([2], np.float32)})
    with pytest.raises(ConversionError, match="nor of any other dialect"):
        same_dialect(source, str(tmp_path / "result"))


@pytest.mark.parametrize("name", ["source", "other", "folder/new", "in_the_way"])
def test_nothing_is_written_over(name, tmp_path):
    source = save(tmp_path / "source", bn_layer("bn"))
    save(tmp_path / "other", bn_layer("other"))
    (tmp_path / "in_the_way").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    message = "no directory" if name == "folder/new" else "exists .*nothing is written"
    with pytest.raises(CheckpointError, match=message):
        same_dialect(source, str(tmp_path / name))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize(
    "suffix, damage",
    [
        (".data-00000-of-00001", flip_a_bit),
        (".data-00000-of-00001", truncate),
        (".data-00000-of-00001", os.remove),
        (".index", truncate),
        (".index", os.remove),
    ],
)
def test_a_damaged_source(suffix, damage, tmp_path):
    source = save(tmp_path / "source", bn_layer("bn"))
    damage(tmp_path / ("source" + suffix))
    with pytest.raises(CheckpointError) as caught:
        same_dialect(source, str(tmp_path / "result"))
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("result*"))


def test_a_result_that_is_not_what_was_asked_for_is_removed(tmp_path, monkeypatch):
    source = save(tmp_path / "source", bn_layer("bn"))
    monkeypatch.setattr(reader_writer, "_same_bits", lambda a, b: False)
    with pytest.raises(CheckpointError, match="bn/beta was not written as it was"):
        same_dialect(source, str(tmp_path / "result"))
    assert not list(tmp_path.glob("result*"))


@pytest.mark.parametrize(
    "given, message",
    [
        ("no_such", "there is no checkpoint .*no_such"),
        ("source.index", "is one file of a checkpoint: give .*source$"),
        ("source.data-00000-of-00001", "is one file of a checkpoint"),
        ("", "names no checkpoint in its file `checkpoint`"),
    ],
)
def test_what_is_no_prefix(given, message, tmp_path):
    save(tmp_path / "source", bn_layer("bn"))
    with pytest.raises(CheckpointError, match=message):
        same_dialect(str(tmp_path / given), str(tmp_path / "result"))


def test_an_object_based_checkpoint(tmp_path):
    values = dict(bn_layer("bn"), _CHECKPOINTABLE_OBJECT_GRAPH=np.array(b"", object))
    source = save(tmp_path / "source", values)
    with pytest.raises(CheckpointError, match="object-based .* only name-based"):
        same_dialect(source, str(tmp_path / "result"))


def test_the_state_file_names_a_checkpoint_that_is_gone(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "gone"\n')
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        same_dialect(str(tmp_path), str(tmp_path / "result"))


def test_relative_paths(tmp_path, monkeypatch):
    shutil.copytree(str(FIXTURES / "tf_layers"), str(tmp_path / "folder"))
    monkeypatch.chdir(tmp_path)
    same_dialect("folder/model.ckpt", "result")
    assert contents("result") == contents("folder/model.ckpt")


# ------------------------------------------------------------- weight averages, hand-written


def with_shadows(average="ExponentialMovingAverage"):
    """A layer and a kernel; all but the moving mean have a shadow of other values."""
    values = dict(bn_layer("bn", channels=4), kernel=np.ones([2, 4], np.float32))
    averaged = [n for n in values if n.count("/") < 2 and "moving_mean" not in n]
    return dict(values, **{f"{n}/{average}": values[n] * 2 + 1 for n in averaged})


def test_averages_become_the_variables(tmp_path):
    values = with_shadows()
    source = save(tmp_path / "source", values)
    conversion = convert(
        source,
        str(tmp_path / "result"),
        from_dialect="slim",
        to_dialect="tensorpack",
        ema="ExponentialMovingAverage",
    )
    result = open_checkpoint(str(tmp_path / "result"))
    for old, new in [("kernel", "kernel"), ("bn/gamma", "bn/gamma")] + [
        ("bn/moving_variance", "bn/variance/EMA")
    ]:
        shadow = values[f"{old}/ExponentialMovingAverage"]
        np.testing.assert_array_equal(result.read(new), shadow)
        np.testing.assert_array_equal(
            result.read(f"{new}/ExponentialMovingAverage"), shadow
        )
    np.testing.assert_array_equal(result.read("bn/mean/EMA"), values["bn/moving_mean"])
    assert "the average of bn/gamma" in str(conversion)


@pytest.mark.parametrize(
    "ema, extra, message",
    [
        ("average", {}, r"no tensor is named VARIABLE/average; .*\['Exponential"),
        (
            "ExponentialMovingAverage",
            {"train/kernel/ExponentialMovingAverage": np.ones([2, 4], np.float32)},
            "kernel has two: kernel/Exp.* and train/kernel/Exp",
        ),
        (
            "ExponentialMovingAverage",
            {"kernel": np.ones([2, 3], np.float32)},
            r"Average has shape \[2, 4\], but kernel has \[2, 3\]",
        ),
    ],
)
def test_averages_that_cannot_become_the_variables(ema, extra, message, tmp_path):
    source = save(tmp_path / "source", dict(with_shadows(), **extra))
    with pytest.raises(ConversionError, match=f"`ema` is .*{message}"):
        same_dialect(source, str(tmp_path / "result"), ema=ema)


HAND_WRITTEN = {
    "c1/pop_mean": "c1/bn/moving_mean",
    "c1/pop_var": "c1/bn/moving_variance",
    "c1/scale": "c1/bn/gamma",
    "c1/shift": "c1/bn/beta",
}


@pytest.mark.parametrize("shape", [[3], [1, 1, 1, 3]])
@pytest.mark.parametrize("dialect", ["hand_written", "bn_tf1"])
def test_a_hand_written_layer_is_adopted(dialect, shape, tmp_path):
    values = {
        name: np.arange(3, dtype=np.float32).reshape(shape) + i
        for i, name in enumerate(HAND_WRITTEN)
    }
    values["c1/scale/Momentum"] = values["c1/scale"] * 3
    others = bn_layer("other") if dialect != "hand_written" else {}
    source = save(tmp_path / "source", dict(values, **others))
    convert(
        source,
        str(tmp_path / "result"),
        from_dialect=dialect,
        to_dialect="tf_layers",
        name_map=HAND_WRITTEN,
    )
    result = open_checkpoint(str(tmp_path / "result"))
    for old, new in HAND_WRITTEN.items():
        np.testing.assert_array_equal(result.read(new), values[old].reshape(3))
    assert result.shapes["c1/bn/gamma/Momentum"] == (3,)
    assert set(others) < set(result.shapes)


@pytest.mark.parametrize(
    "name_map, message",
    [
        ({}, "names no layer: .*OLD=bn/gamma OLD=bn/beta OLD=bn/moving_mean"),
        ({"c1/pop_mean": "bn/moving_mean"}, "gives, bn/moving_mean has no bn/moving_v"),
    ],
)
def test_a_hand_written_layer_is_named_whole(name_map, message, tmp_path):
    values = {name: np.ones([3], np.float32) for name in HAND_WRITTEN}
    source = save(tmp_path / "source", values)
    with pytest.raises(ConversionError, match=message):
        convert(
            source,
            str(tmp_path / "result"),
            from_dialect="hand_written",
            to_dialect="bn_tf1",
            name_map=name_map,
        )


# ------------------------------------------------------------------------ mistyped paths


def test_a_mistyped_path_lists_what_is_there(tmp_path):
    for step in (9, 80, 700):
        save(tmp_path / f"model.ckpt-{step}", {"x": np.ones([1], np.float32)})
    with pytest.raises(
        CheckpointError,
        match="-70; in .* there are: model.ckpt-9, model.ckpt-80, model.ckpt-700$",
    ):
        open_checkpoint(str(tmp_path / "model.ckpt-70"))
    with pytest.raises(CheckpointError, match="there is no directory .*nowhere"):
        open_checkpoint(str(tmp_path / "nowhere" / "model.ckpt"))


def test_a_directory_of_runs_lists_them(tmp_path):
    for name in ("run_10", "run_9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint").write_text("")
    runs = f"{tmp_path}/run_9, {tmp_path}/run_10: give one of them$"
    with pytest.raises(CheckpointError, match=f"but 2 in it have: {runs}"):
        open_checkpoint(str(tmp_path))


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(CheckpointError, match="weights.pt is no checkpoint of Tens"):
        open_checkpoint(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="'PyTorch', .*running_var to gamma, beta"):
        convert("a", "b", from_dialect="PyTorch", to_dialect="bn_tf1")


def test_the_prefix_of_a_graph(tmp_path):
    (tmp_path / "model.meta").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give its graph, .*model.meta$"):
        reader_writer.read_meta_graph(str(tmp_path / "model"))


# ------------------------------------------------------------------------------ banks


def banked(tmp_path):
    """A layer of one bank with all that belongs to one, beside a weight and a step."""
    values = {
        **bn_layer("net/bn"),
        **bn_layer("net/bn/moving_mean", leaves=["biased", "ExponentialMovingAverage"]),
        **bn_layer("net/bn/gamma", leaves=["Momentum"]),
        "net/bn/num_updates": np.float32(7),
        "net/w": np.ones([2, 3], np.float32),
        "global_step": np.int64(5),
    }
    return save(tmp_path / "one", values), values


@pytest.mark.parametrize("affine", [False, True])
def test_one_set_becomes_several_and_one_of_them_the_only_one_again(tmp_path, affine):
    source, values = banked(tmp_path)
    how = {"from_dialect": "bn_tf1", "to_dialect": "bn_tf1"}
    several = str(tmp_path / "several")
    convert(source, several, banks=3, bank_affine=affine, **how)
    found = contents(several)
    own = [n for n in values if "moving" in n or "num_updates" in n]
    own += [n for n in values if "gamma" in n or "beta" in n] if affine else []
    names = [n.replace("bn/", f"bn/bank_{i}/") for n in own for i in (1, 2)]
    assert sorted(found) == sorted([*values, *names])
    for name in own:
        assert found[name.replace("bn/", "bn/bank_2/")] == found[name]
    # What is taken out is told from what is left.
    changed = {n: values[n] for n in values}
    for name in names:
        changed[name] = values[name.replace("/bank_1", "").replace("/bank_2", "")] + (
            1 if "/bank_1" in name else 2
        )
    changed = save(tmp_path / "changed", changed)
    for bank in (0, 2):
        one = str(tmp_path / f"bank_{bank}")
        conversion = convert(changed, one, bank=bank, **how)
        taken = open_checkpoint(one)
        assert set(taken.shapes) == set(values)
        for name, value in values.items():
            shift = bank if name in own else 0
            np.testing.assert_array_equal(taken.read(name), value + shift, name)
        left_out = [row.old for row in conversion.rows if row.new is None]
        assert len(left_out) == 2 * len(own)


def test_banks_of_another_library_and_a_renamed_scope(tmp_path):
    """`convert` spreads what another library called otherwise, where `like` has it."""
    target = str(tmp_path / "target")
    rows = convert(
        fixture("tensorpack"),
        target,
        from_dialect="tensorpack",
        to_dialect="bn_tf1",
        name_map={"conv_bn": "first"},
        banks=2,
    ).rows
    found = contents(target)
    assert found["first/bank_1/moving_mean"] == found["first/moving_mean"]
    assert "first/bank_1/gamma" not in found
    row = next(row for row in rows if row.new == "first/bank_1/moving_mean")
    assert row.old == "conv_bn/mean/EMA"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"banks": 1}, "`banks` is 1, but must be at least 2"),
        ({"bank": 0}, "no layer of several banks"),
        ({"banks": 2, "bank": 0}, "either `banks` spreads one set"),
        ({"bank_affine": True}, "either `banks` spreads one set"),
        ({"from_dialect": "hand_written", "banks": 2}, "convert to one first"),
        ({"of": 2, "banks": 2}, "has 'net/bn/bank_1' already"),
        ({"of": 2, "bank": 2}, r"'net/bn' of .* has the banks \[0, 1\]"),
        (
            {"of": 2, "to_dialect": "slim", "drop": ["*/num_updates"]},
            "net/bn/bank_1/mov",
        ),
    ],
)
def test_what_of_banks_is_refused(tmp_path, options, words):
    source, _ = banked(tmp_path)
    options = {"from_dialect": "bn_tf1", "to_dialect": "bn_tf1", **options}
    if options.pop("of", 0):
        several = str(tmp_path / "several")
        convert(source, several, from_dialect="bn_tf1", to_dialect="bn_tf1", banks=2)
        source = several
    with pytest.raises(ValueError, match=words):
        convert(source, str(tmp_path / "new"), **options)
    assert not os.path.exists(str(tmp_path / "new.index"))


def test_a_layer_may_be_called_as_a_bank_is(tmp_path):
    source = save(tmp_path / "source", bn_layer("net/bank_1"))
    target = str(tmp_path / "target")
    convert(source, target, from_dialect="tf_layers", to_dialect="slim")
    assert sorted(contents(target)) == sorted(bn_layer("net/bank_1"))
