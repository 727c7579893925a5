"""Kill and resume: a run that was stopped ends, bit by bit, as one that was not."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training_toys import Full, Rows, equal, mlp, same_history, squares

from sdeflow._compat import SdeflowWarning
from sdeflow._results import RESULTS
from sdeflow.training import CheckpointError, _loop, fit, load_checkpoint
from sdeflow.training import _file as file_module
from sdeflow.training._file import previous

ADAM = optax.adam(1e-2)


class Killed(BaseException):
    """Ends a run as a kill does: nothing of `fit` catches it."""


def stop_at(step):
    def stop(event):
        if event.step == step:
            raise Killed

    return stop


def run(model=None, data=None, loss=squares, **kwargs):
    given = {
        "optim": ADAM,
        "steps": 20,
        "batch_size": 8,
        "key": jr.key(7),
        "progress": False,
        "checkpoint_every": 4,
    }
    return fit(mlp() if model is None else model, data or Rows(), loss, **(given | kwargs))


def whole(**kwargs):
    """The uninterrupted run, without a checkpoint."""
    return run(**{k: v for k, v in kwargs.items() if k != "checkpoint"})


def same(one, two):
    return (
        equal(one.model, two.model)
        and same_history(one.history, two.history)
        and one.num_steps == two.num_steps
        and one.best_step == two.best_step
        and bool(one.result == two.result)
    )


PROGRAM = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from training_toys import Rows
    from test_resume import run

    def kill(event):
        if event.step == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    run(checkpoint=sys.argv[1], callbacks=[kill], validation=Rows(5, seed=1))
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    path = tmp_path / "run.ckpt"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), str(here)],
        env=os.environ | {"PYTHONPATH": str(here.parents[1]), "PYTHONHASHSEED": "5"},
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(path, mlp(3), part="last")[1]["step"] == 12
    resumed = run(mlp(), checkpoint=path, validation=Rows(5, seed=1))
    assert same(resumed, whole(validation=Rows(5, seed=1)))
    assert resumed.num_steps == 20


DEVICES = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import jax, jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from training_toys import Full, squares
    from test_resume import run, stop_at, Killed

    mesh = Mesh(np.array(jax.devices()), ("data",))

    def spread(model, batch, key, step):
        x = jax.lax.with_sharding_constraint(batch.x, NamedSharding(mesh, PartitionSpec("data")))
        return squares(model, batch._replace(x=x), key, step)

    assert len(jax.devices()) == int(sys.argv[3])
    try:
        done = run(loss=spread, data=Full(), checkpoint=sys.argv[1], callbacks=[stop_at(int(sys.argv[4]))])
        np.save(sys.argv[1] + ".npy", done.history["loss"])
    except Killed:
        pass
"""


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    """Only the order of sums differs: a batch lies on four devices, then on one, and ends where one device ends."""
    path, here = tmp_path / "c", Path(__file__).parent
    for devices, stop in ((4, 13), (1, -1)):
        flags = f"--xla_force_host_platform_device_count={devices}"
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DEVICES), str(path), str(here), str(devices), str(stop)],
            env=os.environ | {"PYTHONPATH": str(here.parents[1]), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
            timeout=300,
        )
    losses = np.load(f"{path}.npy")
    assert len(losses) == 20
    np.testing.assert_allclose(losses, run(data=Full()).history["loss"], rtol=1e-5)


@pytest.mark.parametrize("optim", [ADAM, optax.chain(optax.add_noise(0.1, 0.5, jr.key(3)), optax.sgd(1e-2))])
@pytest.mark.parametrize("validate", [None, 3])
@pytest.mark.parametrize("step", [3, 5, 12])
def test_a_run_resumes_wherever_it_was_stopped(tmp_path, optim, validate, step):
    path = tmp_path / "c"
    given = {"optim": optim, "validation": Rows(5, seed=1), "validate_every": validate}
    with pytest.raises(Killed):
        run(checkpoint=path, callbacks=[stop_at(step)], **given)
    assert same(run(checkpoint=path, **given), whole(**given))


def test_a_run_may_be_stopped_again_and_again(tmp_path):
    path = tmp_path / "c"
    given = {"validation": Rows(5, seed=1), "validate_every": 2, "checkpoint_every": 1}
    for step in (0, 1, 2, 6, 13, 19):
        with pytest.raises(Killed):
            run(checkpoint=path, callbacks=[stop_at(step)], **given)
    assert same(run(checkpoint=path, **given), whole(**given))


def test_patience_counts_on_where_it_was(tmp_path):
    def overshoot(w, batch, key, step):
        return (w - 1.0) ** 2, {}

    given = {
        "loss": overshoot,
        "optim": optax.sgd(1.5),
        "validation": Rows(5),
        "validate_every": 2,
        "patience": 4,
    }
    wanted = run(jnp.zeros(()), **given)
    assert wanted.num_steps == 10
    path = tmp_path / "c"
    with pytest.raises(Killed):
        run(jnp.zeros(()), checkpoint=path, callbacks=[stop_at(6)], **given)
    assert same(run(jnp.zeros(()), checkpoint=path, **given), wanted)
    # The file of a run that ended early says so: nothing is added to it.
    assert same(run(jnp.zeros(()), checkpoint=path, **given), wanted)


def test_an_interrupted_run_goes_on_later(tmp_path):
    def press(event):
        if event.step == 6:
            raise KeyboardInterrupt

    path = tmp_path / "c"
    partial = run(checkpoint=path, callbacks=[press], validation=Rows(5, seed=1))
    assert bool(partial.result == RESULTS.interrupted)
    assert load_checkpoint(path, mlp(), part="last")[1]["step"] == 7
    assert same(run(checkpoint=path, validation=Rows(5, seed=1)), whole(validation=Rows(5, seed=1)))


def test_a_finished_run_is_read_back_and_may_be_extended(tmp_path):
    path = tmp_path / "c"
    first = run(checkpoint=path)
    stamp = path.stat().st_mtime_ns
    assert same(run(checkpoint=path), first)
    assert path.stat().st_mtime_ns == stamp
    assert same(run(checkpoint=path, steps=30), whole(steps=30))
    with pytest.raises(CheckpointError, match=r"at step 30 but steps=20; .* To start afresh"):
        run(checkpoint=path)


@pytest.mark.parametrize("options", [{}, {"validate_every": 4}, {"patience": 3}])
def test_a_run_extended_at_any_step_is_the_whole_one(tmp_path, options):
    weight = optax.linear_schedule(0.0, 1.0, 20)

    def loss(model, batch, key, step):
        value, metrics = squares(model, batch, key, step)
        return weight(step) * value, metrics

    options = {"loss": loss, "validation": Rows(5, seed=1), "optim": optax.adam(0.1), **options}
    wanted = whole(steps=20, **options)
    for first in range(1, 20):
        path = tmp_path / f"{first}"
        ended = run(checkpoint=path, steps=first, **options)
        assert ended.history["validation_step"][-1] == ended.num_steps - 1
        assert same(run(checkpoint=path, steps=first, **options), ended)
        assert same(run(checkpoint=path, steps=20, **options), wanted)


def test_the_best_and_the_last_model_can_be_read_without_fit(tmp_path):
    path = tmp_path / "c"
    found = run(checkpoint=path, validation=Rows(5, seed=1), optim=optax.sgd(-1e-2))  # it gets worse and worse
    assert found.best_step < 19
    best, meta = load_checkpoint(path, mlp(9), part="best")
    last, _ = load_checkpoint(path, mlp(9), part="last")
    assert equal(best, found.model)
    assert equal(last, whole(optim=optax.sgd(-1e-2)).model)
    assert meta["best_step"] == found.best_step


class Bad(Rows):
    """One row is NaN: whichever step meets it fails, and no other."""

    def __init__(self):
        super().__init__()
        self.x[3] = np.nan


@pytest.mark.parametrize("late", [False, True])
def test_a_nonfinite_run_is_saved_as_it_was_before(tmp_path, monkeypatch, late):
    if late:  # many steps are done after the one that failed, before that is noticed
        monkeypatch.setattr(_loop, "_is_ready", lambda report: False)
    order = Rows().order(jr.fold_in(jr.fold_in(jr.key(7), 1), 0))
    first = int(np.flatnonzero(order == 3)[0]) // 8
    path = tmp_path / "c"
    for _ in range(2):  # the step that failed is done again, and fails again
        with pytest.warns(SdeflowWarning, match=f"step {first} .epoch 0, batch {first}, ids .*3"):
            found = run(data=Bad(), checkpoint=path, steps=100, checkpoint_every=50)
        assert len(found.history["loss"]) == first + 1
        last, meta = load_checkpoint(path, mlp(), part="last")
        assert (meta["step"], meta["epoch"], meta["position"]) == (first, 0, first)
        assert equal(last, found.model)
        assert equal(last, run(steps=first).model)
    # Once the data are repaired the same file goes on to the result of a run that never failed.
    assert same(run(checkpoint=path), whole())


# ------------------------------------------------------------------------------------------- another run

OTHER = {
    "batch_size": ({"batch_size": 5}, r"batch_size \(8 in the file, 5 here\)"),
    "key": ({"key": jr.key(8)}, r"key \(\[0, 7\] in the file, \[0, 8\] here\)"),
    "key implementation": ({"key": jr.key(7, impl="rbg")}, "key implementation"),
    "data": ({"data": Rows(name="other")}, r"data \(rows in the file, other here\)"),
    "validation": ({"validation": Rows()}, r"validation \(None in the file, rows here\)"),
    "learning rate": (
        {"optim": optax.adam(2e-2)},
        r"optim \(.*step_size\} -0\.01 in the file, .* -0\.02 here\)",
    ),
    "optimiser": ({"optim": optax.sgd(1e-2)}, "optim "),
    "loss": ({"loss": lambda *args: squares(*args)}, r"loss \(.*squares in the file, .*<lambda> here\)"),
    "activation": ({"model": mlp(activation=jax.nn.relu)}, "tanh in the file and jax.relu here"),
    "width": ({"model": mlp(width=5)}, r"float32\[4, 3\] in the file and float32\[5, 3\] here"),
}


class Signed(eqx.Module):
    """A model with an array that is not trained."""

    w: jax.Array
    sign: jax.Array

    def __call__(self, x):
        return jnp.sum(self.w * x) * self.sign


def signed(sign=1, start=1.0):
    return Signed(jnp.full(3, start), jnp.array(sign))


class Plain(Rows):
    """Data without a fingerprint."""

    fingerprint = None


def edited(factor):
    """A loss of one name whose code differs."""
    space = {"squares": squares}
    exec(f"def loss(*args):\n    value, metrics = squares(*args)\n    return {factor} * value, metrics", space)
    return space["loss"]


CHANGED = {
    "first batch": (
        {"data": Plain()},
        {"data": Plain(seed=1)},
        r"data \(first batch .* in the file, first batch .* here",
    ),
    "code": ({"loss": edited(1.0)}, {"loss": edited(2.0)}, r"loss \(.*loss with code .* in the file, .*loss with code"),
    "integers": ({"model": signed(1)}, {"model": signed(-1)}, r"untrained leaves \(\.sign int32"),
    "start": ({"model": signed()}, {"model": signed(start=2.0)}, r"start \(\.w float32"),
}


@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.parametrize("steps", [2, 3])
def test_a_checkpoint_answers_for_its_own_work_alone(tmp_path, case, steps):
    one, other, match = CHANGED[case]
    path = tmp_path / "c"
    run(checkpoint=path, steps=2, **one)
    assert run(checkpoint=path, steps=2, **one).num_steps == 2
    with pytest.raises(CheckpointError, match=match) as caught:
        run(checkpoint=path, steps=steps, **other)
    assert 'resume="anyway"' in str(caught.value)
    assert "another `checkpoint=`" in str(caught.value)
    went_on = run(checkpoint=path, steps=3, resume="anyway", **other)
    assert went_on.num_steps == 3
    if case == "integers":
        assert int(went_on.model.sign) == -1
    assert run(checkpoint=path, steps=4, **other).num_steps == 4


def test_a_comment_on_the_loss_changes_nothing(tmp_path):
    space = {"squares": squares}
    exec("def loss(*args):\n    'One text.'\n    return squares(*args)", space)
    run(checkpoint=tmp_path / "c", steps=2, loss=space["loss"])
    exec("def loss(*args):\n    'Another.'\n    # and more\n    return squares(*args)", space)
    assert run(checkpoint=tmp_path / "c", steps=3, loss=space["loss"]).num_steps == 3


def test_leaves_that_are_not_trained_come_back_as_they_were(tmp_path):
    ids = np.array([2**40 + 5, 7])
    model = {"net": mlp(), "ids": ids, "mask": jnp.array([0.0, -jnp.inf, 0.0]), "names": ("a", "b")}

    def loss(model, batch, key, step):
        attention = jax.nn.softmax(jax.lax.stop_gradient(model["mask"]))
        value, metrics = squares(lambda x: model["net"](x * attention), batch, key, step)
        return value, metrics

    for checkpoint in (None, tmp_path / "c"):
        found = run(model=model, loss=loss, steps=6, checkpoint=checkpoint)
        assert found.model["ids"] is ids
        assert found.model["mask"].tolist() == [0.0, -jnp.inf, 0.0]
        assert not equal(found.model["net"], mlp())
    again = run(model=model, loss=loss, steps=8, checkpoint=tmp_path / "c")
    assert again.model["ids"] is ids
    loaded, _ = load_checkpoint(tmp_path / "c", model, part="last")
    np.testing.assert_array_equal(loaded["ids"], ids)
    assert loaded["ids"].dtype == np.int64


@pytest.mark.parametrize("case", OTHER)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, case):
    other, match = OTHER[case]
    path = tmp_path / "c"
    run(checkpoint=path, steps=2)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=match) as caught:
        run(checkpoint=path, **other)
    assert "To start afresh, delete the file" in str(caught.value)
    assert path.read_bytes() == before


def test_schedules_are_told_apart_by_what_they_close_over(tmp_path):
    path = tmp_path / "c"
    run(checkpoint=path, steps=2, optim=optax.sgd(optax.cosine_decay_schedule(1e-2, 100)))
    run(checkpoint=path, steps=4, optim=optax.sgd(optax.cosine_decay_schedule(1e-2, 100)))
    with pytest.raises(CheckpointError, match=r"decay_steps\} 100 in the file, .* 200 here"):
        run(checkpoint=path, steps=4, optim=optax.sgd(optax.cosine_decay_schedule(1e-2, 200)))


def test_data_that_lost_batches_is_noticed(tmp_path):
    path = tmp_path / "c"
    run(checkpoint=path, steps=3)
    with pytest.raises(ValueError, match="yielded 1 batches in epoch 0, but 3 had been used"):
        run(checkpoint=path, data=Rows(8))


def test_a_file_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("precious,data\n")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run(checkpoint=path)
    assert path.read_text() == "precious,data\n"
    from sdeflow.training import save_checkpoint

    save_checkpoint(tmp_path / "model", mlp())
    with pytest.raises(CheckpointError, match="not written by `fit`"):
        run(checkpoint=tmp_path / "model")


# ------------------------------------------------------------------------------------------------ faults


class Broken(Rows):
    """Raises in the middle of the second epoch, until it is repaired."""

    def __init__(self, broken=True):
        super().__init__()
        self.broken = broken
        self.opened = 0

    def batches(self, size, key):
        self.opened += 1
        for index, batch in enumerate(super().batches(size, key)):
            if self.broken and self.opened == 2 and index == 2:
                raise RuntimeError("the file server is down")
            yield batch


def test_an_error_of_the_data_is_passed_on_after_the_state_was_saved(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(RuntimeError, match="the file server is down"):
        run(data=Broken(), checkpoint=path, checkpoint_every=1000)
    assert load_checkpoint(path, mlp(), part="last")[1]["step"] == 5
    assert same(run(data=Broken(False), checkpoint=path), whole())


def test_an_error_of_a_callback_is_passed_on_after_the_state_was_saved(tmp_path):
    def fail(event):
        if event.step == 4:
            raise LookupError("no such logger")

    path = tmp_path / "c"
    with pytest.raises(LookupError, match="no such logger"):
        run(checkpoint=path, callbacks=[fail], checkpoint_every=1000)
    assert load_checkpoint(path, mlp(), part="last")[1]["step"] == 5
    assert same(run(checkpoint=path), whole())


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_history_with_a_hole_is_not_saved(tmp_path):
    def loss(model, batch, key, step):
        value, metrics = squares(model, batch, key, step)
        return value, metrics if len(batch.x) == 8 else {}

    path = tmp_path / "c"
    with pytest.raises(ValueError, match="return the same ones at every step"):
        run(loss=loss, checkpoint=path, checkpoint_every=2)
    assert load_checkpoint(path, mlp(), part="last")[1]["step"] == 2


def test_a_disk_that_is_full_for_a_while_only_warns(tmp_path, monkeypatch):
    path = tmp_path / "c"
    run(checkpoint=path, steps=4)
    before = path.read_bytes()
    sizes = []

    def fill(event):
        if event.step == 5:
            monkeypatch.setattr(file_module.os, "fsync", full)
        if event.step == 14:
            sizes.append(path.read_bytes() == before)
            monkeypatch.undo()

    with pytest.warns(SdeflowWarning, match="No space left") as caught:
        found = run(checkpoint=path, callbacks=[fill])
    assert ["after 8 steps" in str(w.message) for w in caught] == [True, False]
    assert ["after 12 steps" in str(w.message) for w in caught] == [False, True]
    assert sizes == [True]
    assert same(found, whole())
    assert load_checkpoint(path, mlp(), part="last")[1]["step"] == 20


def test_if_nothing_could_ever_be_written_the_end_is_an_error_with_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(file_module.os, "fsync", full)
    with (
        pytest.warns(SdeflowWarning),
        pytest.raises(OSError, match="no checkpoint could be written") as caught,
    ):
        run(checkpoint=tmp_path / "c")
    assert caught.value.errno == errno.ENOSPC
    assert same(caught.value.fit, whole())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(Killed):
        run(checkpoint=path, callbacks=[stop_at(13)])
    good = previous(path).read_bytes()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(SdeflowWarning, match="is damaged .* was loaded"), pytest.raises(Killed):
        run(checkpoint=path, callbacks=[stop_at(13)])
    assert previous(path).read_bytes() == good  # the damaged file did not take its place
    assert same(run(checkpoint=path), whole())


@pytest.mark.parametrize("name", ["a b", "çà-β-試.ckpt"])
def test_any_path_will_do(tmp_path, name):
    (tmp_path / name).mkdir()
    path = tmp_path / name / name
    run(checkpoint=str(path), steps=2)
    assert run(checkpoint=str(path), steps=3).num_steps == 3


def test_a_path_that_cannot_be_written_is_refused_before_training(tmp_path):
    started = []
    watch = {"callbacks": [started.append]}
    with pytest.raises(IsADirectoryError, match="is a directory"):
        run(checkpoint=tmp_path, **watch)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(checkpoint=tmp_path / "none" / "c", **watch)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="does not exist"):
        run(checkpoint=tmp_path / "file" / "c", **watch)
    with pytest.raises(OSError, match="too long"):
        run(checkpoint=tmp_path / ("x" * 253), **watch)
    assert started == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        run(checkpoint=tmp_path / "c")


def test_a_disk_that_refuses_new_files_is_noticed_before_training(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(file_module.Path, "touch", read_only)
    with pytest.raises(OSError, match="Read-only"):
        run(checkpoint=tmp_path / "c")


def test_what_a_killed_writer_left_is_cleared_away_once_it_is_old(tmp_path):
    path = tmp_path / "c"
    run(checkpoint=path, steps=1)
    prefix = file_module._prefix(path)
    old, young, foreign = (tmp_path / n for n in (f"{prefix}1-a.tmp", f"{prefix}1-b.tmp", ".sdeflow-other-1.tmp"))
    for file in (old, young, foreign):
        file.write_text("half")
    for file in (old, foreign):
        os.utime(file, (0, 0))
    run(checkpoint=path, steps=2)
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


def test_metrics_of_any_name_survive(tmp_path):
    def loss(model, batch, key, step):
        value, _ = squares(model, batch, key, step)
        return value, {'it\'s a "name"': value}

    path = tmp_path / "c"
    run(loss=loss, checkpoint=path, steps=3)
    found = run(loss=loss, checkpoint=path, steps=6)
    np.testing.assert_array_equal(found.history['it\'s a "name"'], found.history["loss"])
