"""``python -m sdeflow``: what the demo prints and leaves behind, and what ``info`` notices."""

import importlib.util
import re
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sdeflow import __main__ as command
from sdeflow._demo import _bridges, _samplers, _series
from sdeflow.data import Samples, Snapshots, TimeSeries, simulated_cells


def test_a_quick_demo_scores_the_test_set_and_leaves_a_figure(tmp_path, capsys):
    assert command.main(["demo", "--quick", "--out", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    figure = tmp_path / "new" / "series.png"
    assert lines[-1].endswith(f"The figure: {figure}")
    assert figure.read_bytes().startswith(b"\x89PNG")
    shares = [float(x) for x in re.findall(r"\d\.\d{3}", "\n".join(x for x in lines if "Test accuracy" in x))]
    assert len(shares) == 2
    assert all(0 <= x <= 1 for x in shares)


@pytest.mark.parametrize("chosen", [True, False])
def test_the_demos_keep_compiled_programs_where_nobody_chose_a_place(chosen, tmp_path, monkeypatch, request):
    names = [f"jax_{name}" for name in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")]
    names.append("jax_persistent_cache_min_entry_size_bytes")
    before = {name: jax.config.values[name] for name in names}
    request.addfinalizer(lambda: [jax.config.update(*item) for item in before.items()])
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere" if chosen else None)
    command.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == ("elsewhere" if chosen else str(tmp_path / "sdeflow"))
    assert (tmp_path / "sdeflow").exists() is not chosen


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon carries the speech data")
def test_the_demo_classifies_speech_with_half_of_the_values_missing(tmp_path):
    start = time.process_time()
    lines = list(_series.series(tmp_path))
    accuracy, trivial = (float(x) for x in re.findall(r"\d\.\d{3}", next(x for x in lines if "Test accuracy" in x)))
    assert accuracy >= 0.93
    assert accuracy > trivial
    assert time.process_time() - start < 180


def test_without_the_speech_data_simulated_ones_take_their_place(monkeypatch):
    def missing():
        raise FileNotFoundError("The files were not found; run `pip install this`.")

    monkeypatch.setattr(_series, "japanese_vowels", missing)
    name, *parts = _series._load(jax.random.key(0), quick=False)
    assert "pip install this" in name
    assert "simulated series" in name
    assert all(np.isfinite(x).any() for part in parts for x in part.values)


def test_the_parts_of_the_data_are_disjoint_half_observed_and_standardised_by_the_first():
    _, fitting, held_out, test = _series._load(jax.random.key(0), quick=True)
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
    monkeypatch.setattr(_series, "_train", lambda *args: fitted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    lines = list(_series.series(tmp_path, quick=True))
    assert 'pip install "sdeflow[plot]"' in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_centroid_ignores_what_is_missing():
    nan = float("nan")
    train = TimeSeries.from_arrays([[0, 1]] * 4, [[0, nan], [2, nan], [9, 11], [nan, 12]], labels=[0, 0, 1, 1])
    test = TimeSeries.from_arrays([[0, 1]] * 3, [[nan, 5], [nan, 7], [-100, 100]], labels=[0, 1, 0])
    # The centroids are 1 and 11, so that the border is at 6; the means are 5, 7 and 0.
    assert _series.nearest_centroid(train, test).tolist() == [0, 1, 0]


# ---- Bridges. ----


def scores(lines):
    """The three distances of each row of the table."""
    rows = [re.fullmatch(r"  (\D.*?) +(\S+) / (\S+) / (\S+)", line) for line in lines]
    return {row[1]: [float(x) for x in row.groups()[1:]] for row in rows if row}


def fates(lines):
    """The shares of what each kind of cells becomes."""
    rows = [re.fullmatch(r"  day (\d+), (\w+) \(\d+\) +(.*)", line) for line in lines]
    share = lambda text: {name: int(x) for x, name in re.findall(r"(\d+)% (\w+)", text)}
    return {(row[1], row[2]): share(row[3]) for row in rows if row}


@pytest.fixture
def file(tmp_path):
    """The cells of the quick demo as a biologist has them: shuffled, in units of their own, days as categories."""
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    cells = simulated_cells(100, key=jax.random.key(1))
    order = np.random.default_rng(0).permutation(cells.num_cells)
    days, kinds = np.repeat([f"{t:g}" for t in cells.times], cells.counts)[order], np.concatenate(cells.labels)[order]
    columns = {"day": pandas.Categorical(days), "cell_type": pandas.Categorical(kinds)}
    obs = pandas.DataFrame(columns, index=[f"cell{i}" for i in order])
    adata = anndata.AnnData(np.zeros((len(order), 2), np.float32), obs=obs)
    adata.obsm["X_pca"] = 5 * np.concatenate(cells.samples)[order]
    path = tmp_path / "mine.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.mark.slow
def test_a_quick_demo_of_bridges_predicts_a_day_and_leaves_a_figure(tmp_path, capsys):
    assert command.main(["demo", "--job", "bridges", "--quick", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f"The figure: {tmp_path / 'bridges.png'}")
    assert (tmp_path / "bridges.png").read_bytes().startswith(b"\x89PNG")
    assert "50 cells against 50" in "\n".join(lines)
    found = scores(lines)
    names = ["the bridge", "interpolate, from all other times", "straight along optimal transport"]
    assert list(found) == [*names, "a copy of day 1", "the other half of day 2"]
    for k in range(3):
        assert found["the bridge"][k] < 0.7 * found["a copy of day 1"][k]
    become = fates(lines)
    assert all(95 <= sum(shares.values()) <= 101 for shares in become.values())
    # Whoever has chosen stays; progenitors may still become either.
    assert become["2", "A"]["A"] > 90
    assert become["2", "B"]["B"] > 90
    assert {"A", "B"} <= {name for name, share in become["2", "progenitor"].items() if share > 20}


def test_velocities_go_into_a_copy_of_a_file(tmp_path, file, capsys):
    anndata = pytest.importorskip("anndata")
    before, out = file.read_bytes(), tmp_path / "out"
    assert (
        command.main(
            ["demo", "--job", "bridges", "--quick", "--data", f"{file}", "--label", "cell_type", "--out", f"{out}"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert file.read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["bridges.png", "mine-velocity.h5ad"]
    assert f'obsm["velocity_pca"] of a copy, {out / "mine-velocity.h5ad"}; {file} is as it was.' in "\n".join(lines)
    given, written = anndata.read_h5ad(file), anndata.read_h5ad(out / "mine-velocity.h5ad")
    velocity = np.asarray(written.obsm["velocity_pca"])
    assert velocity.shape == written.obsm["X_pca"].shape
    assert list(written.obs_names) == list(given.obs_names)
    assert written.uns["sdeflow"]["time"] == "day"
    assert fates(lines)["2", "A"]["A"] > 90
    # A day later the cells of a day are where those of the next are: the mean of the velocities says so.
    cells = Snapshots.from_anndata(given, time="day")
    for i in (0, 1, 2):
        step = cells.samples[i + 1].mean(axis=0) - cells.samples[i].mean(axis=0)
        mean = velocity[cells.index[i]].mean(axis=0)
        assert np.linalg.norm(mean - step) < 0.35 * np.linalg.norm(step)


def test_two_days_without_labels_have_neither_a_score_nor_fates(tmp_path, file):
    anndata = pytest.importorskip("anndata")
    adata = anndata.read_h5ad(file)
    adata[adata.obs["day"].isin(["0", "1"])].write_h5ad(file)
    lines = list(_bridges.bridges(tmp_path, data=file, quick=True))
    assert any("Nothing is held out" in line for line in lines)
    assert any("--label" in line for line in lines)
    assert scores(lines) == fates(lines) == {}
    assert (tmp_path / "bridges.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--time", "week"], r"no column 'week' in obs; it has \['day', 'cell_type'\]"),
        (["--label", "type"], r"no column 'type' in obs"),
        (["--rep", "X_umap"], r"no 'X_umap' in obsm; it has \['X_pca'\]"),
        (["--time", "cell_type"], "are not numbers"),
    ],
)
def test_a_file_that_lacks_what_is_named_is_refused_in_a_sentence(options, words, file, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["demo", "--job", "bridges", "--data", f"{file}", "--out", f"{file.parent / 'out'}", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(words, error)
    assert len(error.splitlines()) == 1
    assert not (file.parent / "out").exists()


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("anndata")
    with pytest.raises(_bridges.InputError, match=r"There is no file .*none\.h5ad\."):
        list(_bridges.bridges(tmp_path, data=tmp_path / "none.h5ad"))
    (tmp_path / "text.h5ad").write_text("no cells")
    with pytest.raises(_bridges.InputError, match=r"text\.h5ad could not be read as an AnnData file"):
        list(_bridges.bridges(tmp_path, data=tmp_path / "text.h5ad"))
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(_bridges.InputError, match=r'needs anndata: pip install "sdeflow\[single-cell\]"'):
        list(_bridges.bridges(tmp_path, data=tmp_path / "text.h5ad"))


@pytest.mark.slow
def test_the_demo_of_bridges_beats_a_copy_of_the_day_before(tmp_path):
    start = time.process_time()
    lines = list(_bridges.bridges(tmp_path))
    found = scores(lines)
    for k in range(3):
        assert found["the bridge"][k] < 0.5 * found["a copy of day 1"][k]
    # Above the floor, and not far above the hardest baseline.
    assert found["the other half of day 2"][0] < found["the bridge"][0]
    assert found["the bridge"][0] < 1.3 * found["straight along optimal transport"][0]
    become = fates(lines)
    assert become["2", "A"]["A"] >= 95
    assert become["2", "B"]["B"] >= 95
    assert 40 <= become["0", "progenitor"]["A"] <= 60
    assert time.process_time() - start < 180


# ---- Samplers. ----


def numbers(lines, beginning):
    """The numbers with a point in the line that begins so."""
    (line,) = [line for line in lines if line.startswith(beginning)]
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


def shares(lines):
    """How many of ten were as wanted, before and after."""
    return [[int(x) for x in re.findall(r"(\d+) of 10", line)] for line in lines if " of 10 before" in line]


def check_samplers(lines, least):
    """What holds for a network of any size."""
    unipc, ddim = numbers(lines, "Sampling with 10")
    assert unipc < 0.5 * ddim
    (again,) = numbers(lines, "Inverting")
    assert again < 0.1
    for before, after in shares(lines):
        assert before < least <= after


@pytest.mark.slow
def test_a_quick_demo_of_samplers_draws_scores_inverts_and_steers(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert command.main(["demo", "--job", "samplers", "--quick", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f"The figure: {tmp_path / 'samplers.png'}")
    assert (tmp_path / "samplers.png").read_bytes().startswith(b"\x89PNG")
    check_samplers(lines, 5)
    ours, _, none = numbers(lines, "Likelihood")
    assert ours < none == 4.09


@pytest.mark.slow
def test_the_demo_of_samplers_knows_more_of_digits_than_a_normal_law(tmp_path):
    pytest.importorskip("sklearn")
    start = time.process_time()
    lines = list(_samplers.samplers(tmp_path))
    check_samplers(lines, 6)
    ours, normal, _ = numbers(lines, "Likelihood")
    assert ours < normal - 0.3
    assert time.process_time() - start < 300


def test_digits_come_in_levels_and_go_back_to_them():
    digits = Samples(np.array([[0.0, 16.0], [4.0, 8.0]], np.float32), np.array([3, 5]))
    scale = _samplers._Scale.of(digits)
    np.testing.assert_allclose(scale.leave(scale.enter(digits.values)), digits.values, atol=1e-5)
    np.testing.assert_allclose(scale.enter(digits.values).mean(axis=0), 0, atol=1e-6)
    (batch,) = _samplers._Spread(digits, scale).batches(2, key=jax.random.key(0))
    levels = scale.leave(batch.values) + 0.5
    assert (np.floor(levels) == digits.values[batch.ids]).all()
    assert (batch.args == digits.args[batch.ids]).all()
    (other,) = _samplers._Spread(digits, scale).batches(2, key=jax.random.key(1))
    assert not np.isin(other.values, batch.values).any()


def test_without_scikit_learn_a_sentence_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stop:
        command.main(["demo", "--job", "samplers", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == 'The digits come with scikit-learn: pip install "sdeflow[demo]".\n'
    assert not (tmp_path / "out").exists()


# ---- The commands. ----


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


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["demo", "--job", "unknown"],
        ["demo", "--seed", "x"],
        ["demo", "--data", "mine.h5ad"],
        ["demo", "--job", "bridges", "--time", "day"],
    ],
)
def test_a_command_that_is_none_is_explained(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert "usage: python -m sdeflow" in capsys.readouterr().err
