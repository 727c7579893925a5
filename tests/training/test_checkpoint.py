"""Checkpoint files: what they keep, and every way in which they refuse to load something else."""

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training_toys import equal, mlp

from sdeflow._compat import SdeflowWarning
from sdeflow.training import CheckpointError, fit, load_checkpoint, save_checkpoint
from sdeflow.training import _file as file_module
from sdeflow.training._file import previous


class Mixed(eqx.Module):
    net: eqx.nn.MLP
    half: jax.Array
    key: jax.Array
    keys: jax.Array
    host: np.ndarray
    empty: jax.Array
    flag: jax.Array
    name: str = "a name"
    rate: float = eqx.field(static=True, default=0.5)


def mixed(seed=0, **kwargs):
    return Mixed(
        mlp(seed),
        jr.normal(jr.key(seed), (3,)).astype(jnp.bfloat16),
        jr.key(seed),
        jr.split(jr.key(seed, impl="rbg"), 2),
        np.full((2, 2), seed, np.int64),
        jnp.zeros((0, 3)),
        jnp.array(bool(seed)),
        **kwargs,
    )


def bits(tree):
    """Keys as their data, so that trees can be compared bitwise."""
    is_key = lambda x: isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jr.key_data(x) if is_key(x) else x, tree)


def test_a_round_trip_is_exact(tmp_path):
    path = tmp_path / "tree"
    model = mixed(1)
    save_checkpoint(path, model, meta={"note": [1, "two"]})
    found, meta = load_checkpoint(path, mixed(0))
    assert meta == {"note": [1, "two"]}
    assert equal(bits(found), bits(model))
    assert jr.key_impl(found.keys) == jr.key_impl(model.keys)
    assert isinstance(found.host, np.ndarray)
    assert found.host.flags.writeable
    assert not equal(bits(mixed(0)), bits(model))
    jr.normal(found.key)


def test_optimiser_states_and_plain_containers_are_trees_too(tmp_path):
    state = optax.adamw(1e-3).init(eqx.filter(mlp(), eqx.is_inexact_array))
    tree = {"state": state, "list": [jnp.ones(2), (jnp.zeros(()), None)], "it's": np.float32(2.0)}
    save_checkpoint(tmp_path / "c", tree)
    assert equal(load_checkpoint(tmp_path / "c", jax.tree.map(jnp.zeros_like, tree))[0], tree)


leaves = st.one_of(
    st.builds(
        lambda shape, kind, seed: (np.random.default_rng(seed).normal(size=shape) * 9).astype(kind),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.sampled_from(["float32", "float64", "int8", "int32", "bool", "complex64"]),
        st.integers(0, 99),
    ),
    st.sampled_from([None, 1.5, "text", True, 7]),
)
trees = st.recursive(
    leaves,
    lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(st.text(max_size=4), t, max_size=3)),
    max_leaves=6,
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(one=trees, two=trees)
def test_any_tree_survives_and_no_other_tree_loads_it(tmp_path_factory, one, two):
    path = tmp_path_factory.mktemp("trees") / "c"
    save_checkpoint(path, one)
    # A scalar of NumPy is an array of shape (): its value is read from the file, as that of any other.
    array = lambda x: isinstance(x, np.ndarray | np.generic)
    zeros = jax.tree.map(lambda x: np.zeros_like(x) if array(x) else x, one)
    found, _ = load_checkpoint(path, zeros)
    assert equal(found, one)
    assert jax.tree.structure(found) == jax.tree.structure(one)

    def kind(tree):
        plain = lambda x: (x.shape, str(x.dtype)) if array(x) else (type(x).__name__, x)
        return jax.tree.structure(tree), [plain(x) for x in jax.tree.leaves(tree)]

    if kind(one) != kind(two):
        with pytest.raises(CheckpointError):
            load_checkpoint(path, two)


# ----------------------------------------------------------------------------------------- a wrong structure

WRONG = {
    "shape": (
        lambda: mixed_net(width=5),
        r"\.net\.layers\[0\]\.weight is float32\[4, 3\] in the file and float32",
    ),
    "depth": (lambda: mixed_net(depth=2), r"\.net\.layers is tuple of 2 in the file and tuple of 3 here"),
    "activation": (lambda: mixed_net(activation=jax.nn.relu), r"jax\.tanh in the file and jax\.relu here"),
    "lambda": (lambda: mixed_net(activation=lambda x: x), r"jax\.tanh in the file and .*<lambda> with code"),
    "dtype": (
        lambda: replaced("half", jnp.zeros(3, jnp.float16)),
        r"\.half is bfloat16\[3\] .* float16\[3\] here",
    ),
    "key": (lambda: replaced("key", jr.key(0, impl="rbg")), r"of threefry2x32 keys .* of rbg keys here"),
    "no key": (
        lambda: replaced("key", jnp.zeros(2, jnp.uint32)),
        r"\.key is uint32\[2\] of threefry2x32 keys",
    ),
    "missing": (lambda: replaced("empty", None), r"\.empty is in the file only"),
    "text": (lambda: mixed(name="other"), r"'a name' in the file and 'other' here"),
    "static": (lambda: mixed(rate=0.25), r"\.rate is 0\.5 in the file and 0\.25 here"),
    "class": (lambda: mlp(), r"the whole is test_checkpoint\.Mixed in the file and equinox\.MLP here"),
    "container": (lambda: {"net": mlp()}, "the whole is .* in the file and dict here"),
}


def mixed_net(**kwargs):
    return eqx.tree_at(lambda m: m.net, mixed(), mlp(**kwargs))


def replaced(name, value):
    return eqx.tree_at(lambda m: getattr(m, name), mixed(), value)


@pytest.mark.parametrize("case", WRONG)
def test_another_structure_is_refused_by_name(tmp_path, case):
    like, match = WRONG[case]
    save_checkpoint(tmp_path / "c", mixed())
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path / "c", like())


def test_all_differences_are_named_at_once(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c", {"a": jnp.ones(1), "b": jnp.ones(3), "d": jnp.ones(1)})
    for name in (
        "['a'] is float32[2] in the file and float32[1] here",
        "['c'] is in the file only",
        "['d'] is missing",
    ):
        assert name in str(caught.value)
    assert "['b']" not in str(caught.value)


def test_lambdas_are_told_apart_by_their_code_and_what_they_close_over(tmp_path):
    def scaled(factor):
        return lambda x: factor * x

    save_checkpoint(tmp_path / "c", mlp(activation=scaled(2.5)))
    load_checkpoint(tmp_path / "c", mlp(activation=scaled(2.5)))
    with pytest.raises(CheckpointError, match=r"activation\{factor\} is 2\.5 in the file and 3\.5 here"):
        load_checkpoint(tmp_path / "c", mlp(activation=scaled(3.5)))
    with pytest.raises(CheckpointError, match="with code"):
        load_checkpoint(tmp_path / "c", mlp(activation=lambda x: x * 2.5))


def test_a_field_that_a_newer_library_added_does_not_hurt(tmp_path, monkeypatch):
    from sdeflow.training import _checkpoint

    now = _checkpoint.versions()
    full = _checkpoint.describe
    with monkeypatch.context() as old:
        old.setattr(_checkpoint, "versions", lambda: now | {"equinox": "0.0.1"})
        old.setattr(_checkpoint, "describe", lambda tree: [e for e in full(tree) if e[0] != ".scan"])
        save_checkpoint(tmp_path / "c", mlp(1))
    assert equal(load_checkpoint(tmp_path / "c", mlp(0))[0], mlp(1))
    with pytest.raises(CheckpointError, match=r"tanh .*relu .*written with equinox 0\.0\.1"):
        load_checkpoint(tmp_path / "c", mlp(activation=jax.nn.relu))
    with monkeypatch.context() as odd:
        odd.setattr(_checkpoint, "describe", lambda tree: [e for e in full(tree) if e[0] != ".scan"])
        save_checkpoint(tmp_path / "same", mlp(1))
    with pytest.raises(CheckpointError, match=r"\.scan \(False\) is missing in the file"):
        load_checkpoint(tmp_path / "same", mlp(0))


def test_the_description_is_the_same_in_another_process(tmp_path):
    code = """
        import sys, jax, jax.random as jr, equinox as eqx
        from sdeflow.training import save_checkpoint
        save_checkpoint(sys.argv[1], eqx.nn.MLP(3, "scalar", 4, 1, activation=jax.nn.gelu, key=jr.key(3)))
    """
    start(code, tmp_path / "c", PYTHONHASHSEED="5")
    assert equal(load_checkpoint(tmp_path / "c", mlp(0, activation=jax.nn.gelu))[0], mlp(3))


# --------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, {"w": jnp.arange(50.0), "n": jnp.arange(3)}, meta={"step": 1})
    return path, path.read_bytes(), {"w": jnp.zeros(50), "n": jnp.zeros(3, int)}


def header_end(data):
    return 20 + struct.unpack_from("<Q", data, 12)[0]


def test_every_truncation_is_noticed(saved):
    path, data, like = saved
    for size in sorted({*range(0, len(data), 64), 1, 7, 8, 9, 19, 20, 21, 51, 52, header_end(data), len(data) - 1}):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is empty" if size == 0 else "is damaged"):
            load_checkpoint(path, like)


def test_every_flipped_byte_is_noticed(saved):
    path, data, like = saved
    for index in range(len(data)):
        for flip in (0x01, 0x80) if index < 20 else (0x10,):
            path.write_bytes(data[:index] + bytes([data[index] ^ flip]) + data[index + 1 :])
            with pytest.raises(CheckpointError, match="not a checkpoint" if index < 8 else "is damaged"):
                load_checkpoint(path, like)


@pytest.mark.parametrize("junk", [b"\0", b"junk" * 100])
def test_trailing_junk_is_noticed(saved, junk):
    path, data, like = saved
    path.write_bytes(data + junk)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path, like)


def resigned(data):
    return data + hashlib.sha256(data).digest()


def test_a_payload_that_belies_its_header_is_noticed_in_spite_of_a_good_digest(saved):
    path, data, like = saved
    path.write_bytes(resigned(data[:-32] + b"\0" * 4))
    with pytest.raises(CheckpointError, match="its header speaks of"):
        load_checkpoint(path, like)


def test_other_files_and_newer_formats_are_refused_for_what_they_are(saved):
    path, data, like = saved
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(CheckpointError, match="not a checkpoint of sdeflow"):
        load_checkpoint(path.with_suffix(".npy"), like)
    path.write_bytes(resigned(data[:8] + struct.pack("<I", 2) + data[12:-32]))
    with pytest.raises(CheckpointError, match="has format 2, but this version of sdeflow reads up to 1; upgrade"):
        load_checkpoint(path, like)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(path.with_name("absent"), like)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="no part 'best'"):
        load_checkpoint(path, like, part="best")


def test_the_one_before_is_loaded_with_a_warning(saved):
    path, data, like = saved
    save_checkpoint(path, {"w": jnp.ones(50), "n": jnp.arange(3)})
    assert previous(path).read_bytes() == data
    for damage in (data[:100], b"", b"something else"):
        path.write_bytes(damage)
        with pytest.warns(SdeflowWarning, match=r"c\.prev', was loaded"):
            tree, meta = load_checkpoint(path, like)
        assert meta == {"step": 1}
        assert tree["w"].tolist() == list(range(50))
    # Saving over the damaged file must not push it in the place of the good one.
    with pytest.warns(SdeflowWarning):
        save_checkpoint(path, {"w": jnp.ones(50), "n": jnp.arange(3)})
    assert previous(path).read_bytes() == data
    path.unlink()
    with pytest.warns(SdeflowWarning, match="is gone"):
        load_checkpoint(path, like)
    # A newer format is not damage: nothing older may be loaded in its place.
    path.write_bytes(resigned(data[:8] + struct.pack("<I", 2) + data[12:-32]))
    with pytest.raises(CheckpointError, match="upgrade"):
        load_checkpoint(path, like)


def test_the_header_can_be_read_by_anyone(saved):
    _, data, _ = saved
    header = json.loads(data[20 : header_end(data)])
    assert header["leaves"] == [["['n']", [3], "int32"], ["['w']", [50], "float32"]]
    assert header["class"] == "builtins.dict"
    assert header["versions"]["jax"] == jax.__version__
    assert {"python", "sdeflow", "diffrax", "equinox"} < header["versions"].keys()
    assert b"pickle" not in data


# -------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["with spaces", "Zürich-čaj-東京.ckpt", "x" * 240])
def test_any_file_name_will_do(tmp_path, name):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path / name, jnp.full(2, value))
    assert load_checkpoint(str(tmp_path / name), jnp.zeros(2))[0].tolist() == [2.0, 2.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, name + ".prev"])


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_litter(saved, monkeypatch, call):
    path, data, like = saved

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_module.os, call, full)
    monkeypatch.setattr(file_module.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"w": jnp.ones(50), "n": jnp.arange(3)})
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["c"]


def test_without_hard_links_the_one_before_is_copied(saved, monkeypatch):
    path, data, _ = saved

    def none(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(file_module.os, "link", none)
    save_checkpoint(path, {"w": jnp.ones(50), "n": jnp.arange(3)})
    assert previous(path).read_bytes() == data


def test_what_has_no_json_form_is_refused_before_anything_is_written(saved):
    path, data, like = saved
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(path, like, meta={"f": jnp.tanh})
    assert path.read_bytes() == data


def start(code, *args, **environment):
    """Run a program that imports the package; return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}"} | environment,
        timeout=120,
        check=not environment.get("MAY_FAIL"),
    ).returncode


KILLED = """
    import os, signal, sys, warnings
    import numpy as np
    from sdeflow.training import save_checkpoint
    from sdeflow.training import _file

    warnings.simplefilter("ignore")  # no jax thread is running yet, so the fork is safe
    folder = sys.argv[1]
    for call in ("fsync", "link", "replace"):
        for nth in (1, 2):
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == signal.SIGKILL, (call, nth)
                continue
            path = os.path.join(folder, f"{call}{nth}")
            for value in (1.0, 2.0, 3.0):
                if value == 3.0:
                    real, count = getattr(os, call), [0]
                    def dying(*args, **kwargs):
                        count[0] += 1
                        if count[0] == nth or call == "link":
                            os.kill(os.getpid(), signal.SIGKILL)
                        return real(*args, **kwargs)
                    setattr(_file.os, call, dying)
                save_checkpoint(path, {"w": np.full(1000, value)})
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_writing_never_costs_a_checkpoint(tmp_path):
    start(KILLED, tmp_path)
    found = {}
    for path in sorted(tmp_path.glob("[flr]*[12]")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the file itself must be whole, not the one before it
            found[path.name] = load_checkpoint(path, {"w": np.zeros(1000)})[0]["w"][0]
    # The third file is there once the second `replace` is done, which is before the second `fsync`.
    assert found.pop("fsync2") == 3.0
    assert found == dict.fromkeys(["fsync1", "link1", "link2", "replace1", "replace2"], 2.0)


def test_threads_that_write_one_name_never_tear_it(tmp_path):
    import concurrent.futures

    path = tmp_path / "c"
    values = [np.full(2000, float(i)) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda v: file_module.write(path, [v.tobytes()], keep=True), values * 5))
    for file in (path, previous(path)):
        data = file.read_bytes()
        assert data == resigned(data[:-32])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i8", ">c8", ">u2", "<f4", "?"])
def test_arrays_in_either_byte_order_come_back_as_numbers(tmp_path, dtype):
    array = np.array([0, 1, 3]).astype(dtype)
    save_checkpoint(tmp_path / "c", {"a": array})
    for like in (np.zeros(3, dtype), np.zeros(3, np.dtype(dtype).newbyteorder("="))):
        found, _ = load_checkpoint(tmp_path / "c", {"a": like})
        assert found["a"].dtype == like.dtype
        np.testing.assert_array_equal(found["a"], array)


def test_strided_and_fortran_arrays_come_back_as_they_were(tmp_path):
    tree = {
        "strided": np.arange(12.0)[::3],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "flag": np.bool_(1),
    }
    save_checkpoint(tmp_path / "c", tree)
    assert equal(load_checkpoint(tmp_path / "c", jax.tree.map(np.zeros_like, tree))[0], tree)


_UNREADABLE = {
    "text": np.array(["aa", "b"]),
    "bytes": np.array([b"aa", b"b"]),
    "objects": np.array(["aa", None], object),
    "records": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
    "masked": np.ma.array([1.0, 2.0], mask=[0, 1]),
}


@pytest.mark.parametrize("name", _UNREADABLE)
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, name):
    path = tmp_path / "c"
    save_checkpoint(path, {"w": jnp.ones(3)})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"\['g'\]"):
        save_checkpoint(path, {"w": jnp.ones(3), "g": _UNREADABLE[name]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_a_file_with_a_leaf_of_text_gives_way_to_the_one_before_it(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_checkpoint(path, {"w": jnp.ones(3)})
    monkeypatch.setattr(file_module, "_check_readable", lambda name, array: None)
    save_checkpoint(path, {"w": np.array(["a", "b", "c"])})
    monkeypatch.undo()
    with pytest.warns(SdeflowWarning, match="not numbers"):
        found, _ = load_checkpoint(path, {"w": jnp.zeros(3)})
    assert found["w"].tolist() == [1, 1, 1]
    with pytest.warns(SdeflowWarning, match="not numbers"):
        save_checkpoint(path, {"w": jnp.full(3, 5.0)})
    assert load_checkpoint(path, {"w": jnp.zeros(3)})[0]["w"].tolist() == [5, 5, 5]
    path.unlink()
    with pytest.warns(SdeflowWarning, match="is gone"):
        assert load_checkpoint(path, {"w": jnp.zeros(3)})[0]["w"].tolist() == [1, 1, 1]


def test_a_write_that_the_disk_changed_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_checkpoint(path, {"w": jnp.ones(3)})
    before, sync = path.read_bytes(), os.fsync

    def flip(handle):
        sync(handle)
        target = os.readlink(f"/proc/self/fd/{handle}")
        if target.endswith(".tmp"):
            with open(target, "r+b") as file:
                file.seek(-40, os.SEEK_END)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(OSError, match="does not hold what was written"):
        save_checkpoint(path, {"w": jnp.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "big").mkdir()
    link, target = tmp_path / "link", tmp_path / "big" / "file"
    link.symlink_to(target)
    for value in (1.0, 2.0):
        save_checkpoint(link, jnp.full(2, value))
        assert link.is_symlink()
        assert load_checkpoint(target, jnp.zeros(2))[0].tolist() == [value, value]
        assert load_checkpoint(link, jnp.zeros(2))[0].tolist() == [value, value]
    assert sorted(os.listdir(tmp_path / "big")) == ["file", "file.prev"]


def test_a_relative_path_stays_where_training_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Numbers:
        def batches(self, size, key):
            yield jnp.full(size, 3.0)

    def leave(event):
        monkeypatch.chdir(tmp_path / "elsewhere")

    loss = lambda w, batch, key, step: (jnp.mean((w - batch) ** 2), {})
    fit(jnp.zeros(()), Numbers(), loss, optim=optax.sgd(0.1), steps=4, batch_size=4, key=jr.key(0), progress=False,
        checkpoint="run.ckpt", callbacks=[leave])  # fmt: skip
    assert os.listdir(tmp_path / "elsewhere") == []
    assert "run.ckpt" in os.listdir(tmp_path)
