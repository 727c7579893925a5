"""``python -m sdeflow``: what the demo prints and leaves behind, and what ``info`` notices."""

import importlib.util
import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sdeflow import __main__ as command
from sdeflow import _demo
from sdeflow.data import TimeSeries


def test_a_quick_demo_scores_the_test_set_and_leaves_a_figure(tmp_path, capsys):
    assert command.main(["demo", "--quick", "--out", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    figure = tmp_path / "new" / "series.png"
    assert lines[-1].endswith(f"The figure: {figure}")
    assert figure.read_bytes().startswith(b"\x89PNG")
    shares = [float(x) for x in re.findall(r"\d\.\d{3}", "\n".join(x for x in lines if "Test accuracy" in x))]
    assert len(shares) == 2
    assert all(0 <= x <= 1 for x in shares)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon carries the speech data")
def test_the_demo_classifies_speech_with_half_of_the_values_missing(tmp_path):
    start = time.process_time()
    lines = list(_demo.series(tmp_path))
    accuracy, trivial = (float(x) for x in re.findall(r"\d\.\d{3}", next(x for x in lines if "Test accuracy" in x)))
    assert accuracy >= 0.93
    assert accuracy > trivial
    assert time.process_time() - start < 180


def test_without_the_speech_data_simulated_ones_take_their_place(monkeypatch):
    def missing():
        raise FileNotFoundError("The files were not found; run `pip install this`.")

    monkeypatch.setattr(_demo, "japanese_vowels", missing)
    name, *parts = _demo._load(jax.random.key(0), quick=False)
    assert "pip install this" in name
    assert "simulated series" in name
    assert all(np.isfinite(x).any() for part in parts for x in part.values)


def test_the_parts_of_the_data_are_disjoint_half_observed_and_standardised_by_the_first():
    _, fitting, held_out, test = _demo._load(jax.random.key(0), quick=True)
    assert set(fitting.ids).isdisjoint(held_out.ids)
    assert len(fitting) + len(held_out) == 40
    for part in (fitting, held_out, test):
        assert 0.4 < np.isnan(np.concatenate(part.values)).mean() < 0.6
        assert part.buckets == fitting.buckets
        np.testing.assert_array_equal(part.value_shift, fitting.value_shift)
    np.testing.assert_allclose(np.nanmean(np.concatenate(fitting.values), axis=0), 0, atol=1e-6)


def test_without_matplotlib_there_is_no_figure_and_a_way_to_get_one(tmp_path, monkeypatch):
    model = SimpleNamespace(predict=lambda test, **_: np.zeros((len(test), 3)))
    fitted = SimpleNamespace(model=model, message="done.", best_step=1)
    find = importlib.util.find_spec
    monkeypatch.setattr(_demo, "_train", lambda *args: fitted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    lines = list(_demo.series(tmp_path, quick=True))
    assert 'pip install "sdeflow[plot]"' in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_centroid_ignores_what_is_missing():
    nan = float("nan")
    train = TimeSeries.from_arrays([[0, 1]] * 4, [[0, nan], [2, nan], [9, 11], [nan, 12]], labels=[0, 0, 1, 1])
    test = TimeSeries.from_arrays([[0, 1]] * 3, [[nan, 5], [nan, 7], [-100, 100]], labels=[0, 1, 0])
    # The centroids are 1 and 11, so that the border is at 6; the means are 5, 7 and 0.
    assert _demo.nearest_centroid(train, test).tolist() == [0, 1, 0]


def test_info_names_versions_and_a_living_canary(capsys):
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"jax: {jax.__version__}" in out
    for name in ("sdeflow", "jaxlib", "diffrax", "equinox", "optax", "numpy", "python", "devices"):
        assert re.search(rf"^{name}: .+$", out, re.MULTILINE), name
    assert "64-bit numbers: off" in out
    assert "known faults of this jax: none" in out
    assert out.endswith("canary: okay\n")


def test_the_canary_sees_wrong_rows(monkeypatch, capsys):
    monkeypatch.setattr(
        command, "jnp", SimpleNamespace(sum=lambda x: jax.numpy.where(x[0] > 1, jax.numpy.nan, x.sum()))
    )
    assert 100 < command.wrong_rows(1000) < 900
    assert command.main(["info"]) == 1
    assert re.search(r"canary: \d+ of 32769 rows are wrong; \d+ of 40000", capsys.readouterr().out)


def test_info_names_a_bad_release(monkeypatch, capsys):
    monkeypatch.setattr(command, "_BAD_JAX", {jax.__version__: "it is haunted"})
    assert command.main(["info"]) == 1
    assert "known faults of this jax: it is haunted" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["demo", "--job", "unknown"], ["demo", "--seed", "x"]])
def test_a_command_that_is_none_is_explained(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert "usage: python -m sdeflow" in capsys.readouterr().err
