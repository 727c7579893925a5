"""AnnData in and out: what is read from which columns, what is refused, and what scanpy, scVelo and CellRank find."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow._compat import SdeflowWarning
from sdeflow.data import Snapshots, _anndata, simulated_cells, write_velocity

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

DAYS = np.array([4, 2, 7, 2, 4, 7, 2, 4, 7, 7, 2, 4])
COUNT, GENES, DIM = DAYS.size, 8, 3


def table(**columns):
    return pandas.DataFrame(columns, index=[f"cell{i}" for i in range(COUNT)])


def make(day=DAYS, x=sparse.csr_matrix):
    """Twelve cells of eight genes, of which six are highly variable, and three principal components."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (COUNT, GENES)).astype(np.float32)
    obs = table(day=day, mass=1.0 + np.arange(COUNT), kind=pandas.Categorical(list("abcabcabcabc")))
    adata = anndata.AnnData(x(counts), obs=obs)
    adata.obsm["X_pca"] = rng.normal(size=(COUNT, DIM)).astype(np.float32)
    loadings = np.zeros((GENES, DIM))
    loadings[:6] = np.linalg.qr(rng.normal(size=(6, DIM)))[0]
    adata.varm["PCs"] = loadings
    return adata


class Linear(eqx.Module):
    """A bridge whose drift is a(t) x, and whose velocity is half as large."""

    matrix: jax.Array
    t0: float = 2.0
    t1: float = 7.0
    epsilon: float = 0.25

    def drift(self, t, x):
        return (1.0 + t) * self.matrix @ x

    def velocity(self, t, x):
        return 0.5 * self.drift(t, x)


@pytest.fixture
def bridge():
    return Linear(jnp.asarray(np.random.default_rng(1).normal(size=(DIM, DIM))))


def expected(bridge, adata, days=DAYS, kind="velocity"):
    matrix, factor = np.asarray(bridge.matrix), 0.5 if kind == "velocity" else 1.0
    return factor * (1 + np.clip(days, 2, 7)[:, None]) * (np.asarray(adata.obsm["X_pca"]) @ matrix.T)


# ---- Reading. ----


@pytest.mark.parametrize(
    "day",
    [
        DAYS,
        DAYS.astype(np.float32),
        DAYS.astype(str),
        [f" {d}.0 " for d in DAYS],
        pandas.Categorical(DAYS),
        pandas.Categorical(DAYS.astype(str)),
        pandas.Categorical(DAYS.astype(str), categories=["7", "4", "2", "9"], ordered=True),
        pandas.array(DAYS, dtype="Int64"),
        pandas.array(DAYS.astype(str), dtype="string"),
    ],
    ids=["int", "float", "str", "spaces", "cat", "strcat", "ordered", "Int64", "string"],
)
def test_times_of_any_numeric_kind(day):
    adata = make(day)
    data = Snapshots.from_anndata(adata, time="day", weights="mass", labels="kind")
    assert data.times.tolist() == [2, 4, 7]
    for t, x, w, labels, rows in zip(data.times, data.samples, data.weights, data.labels, data.index):
        np.testing.assert_array_equal(rows, np.flatnonzero(t == DAYS))
        np.testing.assert_array_equal(x, adata.obsm["X_pca"][rows])
        assert x.dtype == np.float32
        assert w.tolist() == (1.0 + rows).tolist()
        assert labels.tolist() == [list("abcabcabcabc")[i] for i in rows]


def test_names_say_what_labels_mean():
    names = {2: "early", 4: "day 4", 7: "late"}
    adata = make([names[d] for d in DAYS])
    data = Snapshots.from_anndata(adata, time="day", times={"early": 0.0, "day 4": 0.5, "late": 1, "none": 9})
    assert data.times.tolist() == [0.0, 0.5, 1.0]
    # Two labels may mean one time, and numbers are labels like any other.
    assert Snapshots.from_anndata(make(), time="day", times={2: 0, 4: 0, 7: 1}).counts == (8, 4)
    assert Snapshots.from_anndata(make(pandas.Categorical(DAYS)), time="day", times={2: 0, 4: 0, 7: 1}).counts == (8, 4)


def test_genes_themselves():
    for x in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray, lambda x: x.astype(np.int64)):
        adata = make(x=x)
        data = Snapshots.from_anndata(adata, time="day", rep="X")
        dense = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
        assert data.names == tuple(adata.var_names)
        for got, rows in zip(data.samples, data.index):
            np.testing.assert_array_equal(got, dense[rows])


def test_other_representations():
    adata = make()
    adata.obsm["scores"] = table(up=np.arange(12.0), down=-np.arange(12.0))
    data = Snapshots.from_anndata(adata, time="day", rep="scores")
    assert data.names == ("up", "down")
    assert data.at(7)[:, 0].tolist() == [2, 5, 8, 9]
    adata.obsm["counts"] = sparse.csr_matrix(np.eye(12)[:, :4])
    assert Snapshots.from_anndata(adata, time="day", rep="counts").at(4)[0].tolist() == [1, 0, 0, 0]


def test_anything_with_obs_and_obsm_will_do():
    adata = make()
    plain = SimpleNamespace(obs={"day": DAYS}, obsm={"X_pca": adata.obsm["X_pca"].tolist()}, n_obs=COUNT)
    for a, b in zip(
        Snapshots.from_anndata(plain, time="day").samples, Snapshots.from_anndata(adata, time="day").samples
    ):
        np.testing.assert_allclose(a, b)
    with pytest.raises(ValueError, match=r"no X; give a representation, rep= one of \['X_pca'\]"):
        Snapshots.from_anndata(plain, time="day", rep="X")


def test_views():
    adata = make()
    view = adata[adata.obs["day"] != 4]
    data = Snapshots.from_anndata(view, time="day")
    assert view.is_view
    assert data.times.tolist() == [2, 7]
    np.testing.assert_array_equal(data.at(7), adata.obsm["X_pca"][DAYS == 7])
    np.testing.assert_array_equal(view.obs_names[data.index[1]], adata.obs_names[DAYS == 7])
    # A categorical column of a view has categories without cells.
    some = make(pandas.Categorical(DAYS.astype(str)))
    assert Snapshots.from_anndata(some[DAYS != 4], time="day").times.tolist() == [2, 7]


@pytest.mark.parametrize("x", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_backed_files_are_read_in_blocks(x, tmp_path, monkeypatch):
    adata = make(x=x)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(_anndata, "_BLOCK", 5 * GENES * 4)  # five cells
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for one, other in ((backed, adata), (backed[DAYS != 4], adata[DAYS != 4])):
        for rep in ("X", "X_pca"):
            got = Snapshots.from_anndata(one, time="day", rep=rep)
            for a, b in zip(got.samples, Snapshots.from_anndata(other, time="day", rep=rep).samples, strict=True):
                np.testing.assert_array_equal(a, b)
    backed.file.close()


# ---- What reading refuses. ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "Day"}, r"no column 'Day' in obs; it has \['day', 'mass', 'kind'\]"),
        ({"rep": "X_umap"}, r"no 'X_umap' in obsm; it has \['X_pca'\], and rep=\"X\" is adata.X"),
        ({"rep": "pca"}, r"did you mean 'X_pca'\?"),
        ({"weights": "growth"}, "no column 'growth' in obs"),
        ({"labels": "type"}, "no column 'type' in obs"),
        ({"times": {2: 0.0, 4: 1.0}}, r"labels \[7\] in obs\['day'\] are not in times=; its labels are \[4, 2, 7\]"),
        ({"times": {2: 0.0, 4: 1.0, 7: np.inf}}, r"the cell in row 2 is infinite"),
    ],
)
def test_refuses_keys(options, message):
    with pytest.raises(ValueError, match=message):
        Snapshots.from_anndata(make(), **{"time": "day", **options})


@pytest.mark.parametrize(
    ("day", "message"),
    [
        (
            [f"day {d}" for d in DAYS],
            r"labels \['day 4', 'day 2', 'day 7'\] in obs\['day'\] are not numbers.*times={label",
        ),
        (["d7" if d == 7 else str(d) for d in DAYS], r"labels \['d7'\] .* its labels are \['4', '2', 'd7'\]"),
        (["nan"] * 6 + ["inf"] * 3 + ["1_0"] * 3, r"\['nan', 'inf', '1_0'\] in obs\['day'\] are not numbers"),
        (pandas.Categorical(["E7.5"] * COUNT), r"\['E7.5'\] in obs\['day'\] are not numbers"),
        (
            np.where(DAYS == 7, np.nan, DAYS),
            r"4 of the 12 cells have no time in obs\['day'\], the first in row 2; leave",
        ),
        ([None, *DAYS[1:].astype(str)], r"1 of the 12 cells have no time in obs\['day'\], the first in row 0"),
        (pandas.Categorical([None, *DAYS[1:].astype(str)]), "1 of the 12 cells have no time"),
        (pandas.array([None, *DAYS[1:]], dtype="Int64"), "1 of the 12 cells have no time"),
        (np.where(DAYS == 7, np.inf, DAYS), "the cell in row 2 is infinite"),
        (np.full(COUNT, 3), r"at least two times, but all 12 cells have the same one in obs\['day'\]: \[3.0\]"),
        ([9, *DAYS[1:]], r"one cell at time 9 of obs\['day'\], but every time needs at least two"),
    ],
)
def test_refuses_times(day, message):
    with pytest.raises(ValueError, match=message):
        Snapshots.from_anndata(make(day), time="day")


@pytest.mark.parametrize("day", [DAYS > 3, pandas.to_datetime(DAYS, unit="D"), pandas.to_timedelta(DAYS, unit="D")])
def test_refuses_kinds_of_times(day):
    with pytest.raises(TypeError, match=r"obs\['day'\] is of dtype .*; give numbers, or say"):
        Snapshots.from_anndata(make(day), time="day")


def test_refuses_coordinates():
    adata = make()
    adata.obsm["X_pca"][[3, 5], 1] = np.nan
    with pytest.raises(ValueError, match=r"2 of the 12 cells .* not finite in obsm\['X_pca'\], the first in row 3"):
        Snapshots.from_anndata(adata, time="day")
    plain = SimpleNamespace(obs={"day": DAYS}, obsm={"a": np.zeros(12), "b": [["x"]] * 12, "c": np.zeros((5, 2))})
    with pytest.raises(ValueError, match=r"obsm\['a'\] must be a matrix"):
        Snapshots.from_anndata(plain, time="day", rep="a")
    with pytest.raises(TypeError, match=r"obsm\['b'\]: values must be real numbers"):
        Snapshots.from_anndata(plain, time="day", rep="b")
    with pytest.raises(ValueError, match=r"obsm\['c'\] has 5 rows, but there are 12 cells"):
        Snapshots.from_anndata(plain, time="day", rep="c")


def test_sparse_is_made_dense_only_below_a_limit(monkeypatch):
    # Two million cells of 30 000 genes, none of them stored: 223.5 GiB as a dense array.
    wide = sparse.csr_matrix((2_000_000, 30_000), dtype=np.float32)
    plain = SimpleNamespace(obs={"day": np.arange(2_000_000) % 2}, obsm={}, X=wide, n_obs=2_000_000)
    message = (
        r"X would take 223.5 GiB as a dense array of 2000000 cells and 30000 columns, above the limit of 1 GiB; give"
    )
    with pytest.raises(ValueError, match=message):
        Snapshots.from_anndata(plain, time="day", rep="X")
    monkeypatch.setattr(_anndata, "_LIMIT", COUNT * GENES * 4)
    Snapshots.from_anndata(make(), time="day", rep="X")
    monkeypatch.setattr(_anndata, "_LIMIT", COUNT * GENES * 4 - 1)
    with pytest.raises(ValueError, match="above the limit"):
        Snapshots.from_anndata(make(), time="day", rep="X")
    # What is dense already takes no more memory than it does.
    Snapshots.from_anndata(make(x=np.asarray), time="day", rep="X")


# ---- Writing. ----


@pytest.mark.parametrize("kind", ["velocity", "drift"])
def test_every_cell_has_the_velocity_of_its_own_time(bridge, kind):
    adata = make(pandas.Categorical(DAYS.astype(str)))
    assert write_velocity(adata, bridge, time="day", kind=kind) is None
    velocity = adata.obsm["velocity_pca"]
    assert velocity.dtype == np.float32
    np.testing.assert_allclose(velocity, expected(bridge, adata, kind=kind), rtol=1e-4, atol=1e-5)
    assert "velocity" not in adata.layers
    notes = adata.uns["sdeflow"]
    assert notes["times"].tolist() == [2, 4, 7]
    assert {k: notes[k] for k in ("rep", "time", "kind", "epsilon", "t0", "t1", "bridge")} == {
        "rep": "X_pca",
        "time": "day",
        "kind": kind,
        "epsilon": 0.25,
        "t0": 2.0,
        "t1": 7.0,
        "bridge": "Linear",
    }


def test_an_earlier_call_says_which_column(bridge):
    adata = make()
    with pytest.raises(ValueError, match=r"time= must name the column of obs.*\['day', 'mass', 'kind'\]"):
        write_velocity(adata, bridge)
    write_velocity(adata, bridge, time="day")
    write_velocity(adata, bridge, kind="drift", key_added="drift")
    np.testing.assert_allclose(adata.obsm["drift_pca"], expected(bridge, adata, kind="drift"), rtol=1e-4, atol=1e-5)


def test_one_time_for_all_and_labels_with_a_meaning(bridge):
    adata = make([f"day {d}" for d in DAYS])
    write_velocity(adata, bridge, time=3.0)
    np.testing.assert_allclose(
        adata.obsm["velocity_pca"], expected(bridge, adata, np.full(12, 3)), rtol=1e-4, atol=1e-5
    )
    assert "time" not in adata.uns["sdeflow"]
    write_velocity(adata, bridge, time="day", times={f"day {d}": d for d in (2, 4, 7)})
    np.testing.assert_allclose(adata.obsm["velocity_pca"], expected(bridge, adata), rtol=1e-4, atol=1e-5)


def test_many_cells_are_one_program(bridge):
    count = 2500  # two blocks and a half
    traces = []

    class Counted(Linear):
        def velocity(self, t, x):
            traces.append(x.shape)
            return super().velocity(t, x)

    x = np.random.default_rng(3).normal(size=(count, DIM))
    days = np.linspace(2, 7, count)
    plain = SimpleNamespace(obs={"day": days}, obsm={"X_pca": x}, uns={}, n_obs=count)
    for scale in (1.0, 2.0):
        write_velocity(plain, Counted(scale * bridge.matrix), time="day")
        assert traces == [(DIM,)]
        np.testing.assert_allclose(
            plain.obsm["velocity_pca"], scale * expected(bridge, plain, days), rtol=1e-4, atol=1e-4
        )


def test_an_object_that_changed_is_read_anew():
    plain = SimpleNamespace(obs={"day": [0.0, 1.0]}, obsm={"X_pca": np.ones((2, 2))}, uns={})
    bridge = SimpleNamespace(t0=0.0, t1=1.0, rate=1.0)
    bridge.velocity = lambda t, x: bridge.rate * x
    for bridge.rate in (1.0, 3.0):
        write_velocity(plain, bridge, time="day")
        assert (plain.obsm["velocity_pca"] == bridge.rate).all()


def test_cells_without_a_time_get_nan(bridge):
    day = np.where(DAYS == 4, np.nan, DAYS)
    adata = make(day)
    with pytest.warns(SdeflowWarning, match="4 of the 12 cells have no time, and their velocity is NaN"):
        write_velocity(adata, bridge, time="day", to_genes=True)
    for found in (adata.obsm["velocity_pca"], adata.layers["velocity"]):
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), DAYS == 4)
        np.testing.assert_array_equal(np.isnan(found).any(axis=1), DAYS == 4)
    # Their coordinates need not be finite either.
    adata.obsm["X_pca"][0] = np.nan
    with pytest.warns(SdeflowWarning, match="4 of the 12"):
        write_velocity(adata, bridge, time="day")


def test_times_beyond_the_horizon_are_clipped_and_said():
    bridge = Linear(jnp.eye(DIM), t0=3.0, t1=5.0)
    adata = make()
    with pytest.warns(SdeflowWarning, match=r"8 of 12 cells lie outside .* from 2 to 7, outside of .* \[3, 5\]"):
        write_velocity(adata, bridge, time="day")
    clipped = np.clip(DAYS, 3, 5)
    np.testing.assert_allclose(adata.obsm["velocity_pca"], expected(bridge, adata, clipped), rtol=1e-5)
    with pytest.raises(ValueError, match=r"All 12 cells have times from 2 to 7, .* \[0, 1\]; put them into its units"):
        write_velocity(adata, Linear(jnp.eye(DIM), t0=0.0, t1=1.0), time="day")


def test_a_bridge_without_a_drift_at_its_end():
    singular = SimpleNamespace(t0=2.0, t1=7.0, velocity=lambda t, x: x / (7.0 - t))
    adata = make()
    with pytest.raises(ValueError, match=r"4 of the 12 cells .* the bridge's velocity, the first in row 2; .*latest="):
        write_velocity(adata, singular, time="day")
    assert "velocity_pca" not in adata.obsm
    assert "sdeflow" not in adata.uns
    write_velocity(adata, singular, time="day", latest=6.5)
    np.testing.assert_allclose(adata.obsm["velocity_pca"][2], 2 * adata.obsm["X_pca"][2], rtol=1e-5)
    for latest in (8.0, 2.0):
        with pytest.raises(ValueError, match=r"latest must lie in \(2, 7\]"):
            write_velocity(adata, singular, time="day", latest=latest)


def test_velocities_of_genes(bridge):
    adata = make()
    write_velocity(adata, bridge, time="day", to_genes=True)
    velocity, loadings = expected(bridge, adata), adata.varm["PCs"]
    np.testing.assert_allclose(adata.layers["velocity"], velocity @ loadings.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adata.layers["Ms"], adata.obsm["X_pca"] @ loadings.T, rtol=1e-4, atol=1e-5)
    assert adata.layers["velocity"].dtype == np.float32
    assert adata.var["velocity_genes"].tolist() == [True] * 6 + [False] * 2
    # What CellRank compares: velocities with differences of cells, in either space alike.
    step = adata.layers["Ms"][1] - adata.layers["Ms"][0]
    there, here = step @ adata.layers["velocity"][0], (adata.obsm["X_pca"][1] - adata.obsm["X_pca"][0]) @ velocity[0]
    np.testing.assert_allclose(there, here, rtol=1e-3)


def test_moments_that_are_there_stay(bridge):
    adata = make()
    adata.layers["Ms"] = np.ones((COUNT, GENES))
    write_velocity(adata, bridge, time="day", to_genes=True, key_added="flow")
    assert (adata.layers["Ms"] == 1).all()
    # From anndata 0.13 on, X itself is the layer None.
    assert {"flow"} == set(adata.layers) - {"Ms", None}
    assert "flow_genes" in adata.var
    assert "flow_pca" in adata.obsm


def test_units_of_the_snapshots(bridge):
    adata = make()
    data = Snapshots.from_anndata(adata, time="day").standardise().keep(2)
    small = Linear(jnp.asarray(bridge.matrix[:2, :2]))
    write_velocity(adata, small, time="day", like=data, to_genes=True)
    inside = (adata.obsm["X_pca"][:, :2] - data.shift) / data.scale
    velocity = 0.5 * (1 + DAYS[:, None]) * (inside @ np.asarray(small.matrix).T) * data.scale
    found = adata.obsm["velocity_pca"]
    assert found.shape == adata.obsm["X_pca"].shape  # as CellRank asks
    np.testing.assert_allclose(found[:, :2], velocity, rtol=1e-4, atol=1e-5)
    assert np.isnan(found[:, 2]).all()  # which CellRank leaves out
    np.testing.assert_allclose(adata.layers["velocity"], velocity @ adata.varm["PCs"][:, :2].T, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="dot_general") as caught:
        write_velocity(adata, small, time="day")
    assert "given cells of 3 components; if it was fitted to fewer, give like=" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("to_genes", [False, True])
def test_a_view_becomes_a_copy(bridge, to_genes):
    adata = make()
    view = adata[DAYS != 4]
    write_velocity(view, bridge, time="day", to_genes=to_genes)
    assert not view.is_view
    assert "velocity_pca" not in adata.obsm
    assert "velocity_genes" not in adata.var
    np.testing.assert_allclose(view.obsm["velocity_pca"], expected(bridge, view, DAYS[DAYS != 4]), rtol=1e-4, atol=1e-5)
    assert ("velocity" in view.layers) == to_genes


def test_it_survives_a_file(bridge, tmp_path):
    adata = make()
    write_velocity(adata, bridge, time="day", to_genes=True)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    for group, key in (("obsm", "velocity_pca"), ("layers", "velocity"), ("layers", "Ms")):
        np.testing.assert_array_equal(getattr(back, group)[key], getattr(adata, group)[key])
    assert back.var["velocity_genes"].tolist() == adata.var["velocity_genes"].tolist()
    assert back.uns["sdeflow"]["rep"] == "X_pca"
    assert float(back.uns["sdeflow"]["epsilon"]) == 0.25
    # What was read from a file is no list any more, and the column is still known.
    back.obsm["X_umap"] = np.asarray(back.obsm["X_pca"])
    write_velocity(back, bridge, rep="X_umap")
    assert list(back.uns["velocity_params"]["embeddings"]) == ["pca", "umap"]
    back.write_h5ad(tmp_path / "again.h5ad")


def test_backed_files_can_be_written_to(bridge, tmp_path):
    make().write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    write_velocity(backed, bridge, time="day", to_genes=True)
    assert backed.obsm["velocity_pca"].shape == (COUNT, DIM)
    assert backed.layers["velocity"].shape == (COUNT, GENES)
    with pytest.raises(ValueError, match=r"view of a backed AnnData cannot be written to; take adata.to_memory\(\)"):
        write_velocity(backed[:5], bridge, time="day")
    backed.file.close()


def test_scvelo_takes_it_for_its_own(bridge):
    """By the rule of its plots, which otherwise compute it anew, and keeps what it has noted itself."""
    adata = make()
    adata.uns["velocity_params"] = {"mode": "stochastic", "embeddings": np.array(["tsne"], dtype=object)}
    write_velocity(adata, bridge, time="day")
    write_velocity(adata, bridge, time="day")
    assert adata.uns["velocity_params"] == {"mode": "stochastic", "embeddings": ["tsne", "pca"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "Day"}, "no column 'Day' in obs"),
        ({"rep": "X_umap"}, "no 'X_umap' in obsm"),
        ({"rep": "X_umap", "to_genes": True}, 'to_genes=True needs rep="X_pca"'),
        ({"kind": "score"}, 'kind must be "velocity" or "drift"'),
    ],
)
def test_writing_refuses(bridge, options, message):
    adata = make()
    with pytest.raises(ValueError, match=message):
        write_velocity(adata, bridge, **{"time": "day", **options})
    assert set(adata.obsm) == {"X_pca"}


def test_writing_refuses_more(bridge, monkeypatch):
    adata = make()
    with pytest.raises(TypeError, match="A SimpleNamespace has no t0 and no velocity; give a bridge"):
        write_velocity(adata, SimpleNamespace(t1=1.0), time="day")
    with pytest.raises(TypeError, match="time must be a column of obs or one finite number"):
        write_velocity(adata, bridge, time=DAYS)
    nowhere = make(np.full(COUNT, np.nan))
    with pytest.raises(ValueError, match=r"No cell has a time in obs\['day'\]"):
        write_velocity(nowhere, bridge, time="day")
    adata.obsm["X_pca"][4, 0] = np.inf
    with pytest.raises(ValueError, match=r"1 of the 12 cells .* not finite in obsm\['X_pca'\], the first in row 4"):
        write_velocity(adata, bridge, time="day")
    adata = make()
    flat = SimpleNamespace(t0=2.0, t1=7.0, velocity=lambda t, x: x.sum())
    with pytest.raises(ValueError, match=r"gives \(\) for a cell of shape \(3,\)"):
        write_velocity(adata, flat, time="day")
    monkeypatch.setattr(_anndata, "_LIMIT", 100)
    with pytest.raises(ValueError, match="Velocities of all genes would take .*subset to the highly variable genes"):
        write_velocity(adata, bridge, time="day", to_genes=True)
    del adata.varm["PCs"]
    with pytest.raises(ValueError, match=r'no "PCs" in varm.*it has \[\]'):
        write_velocity(adata, bridge, time="day", to_genes=True)
    adata.varm["PCs"] = np.ones((GENES, 2))
    with pytest.raises(ValueError, match=r'varm\["PCs"\] has 2 components, but obsm\["X_pca"\] has 3'):
        write_velocity(adata, bridge, time="day", to_genes=True)
    assert set(adata.obsm) == {"X_pca"}


def test_an_error_of_the_bridge_is_its_own(bridge):
    """A bridge without a backward potential says itself which option makes one."""

    class OneWay(Linear):
        def velocity(self, t, x):
            raise ValueError('give backward="samples"')

    with pytest.raises(ValueError, match='^give backward="samples"'):
        write_velocity(make(), OneWay(bridge.matrix), time="day")


def test_simulated_cells_go_there_and_back():
    data = simulated_cells(30, key=jax.random.key(0))
    order = np.random.default_rng(0).permutation(data.num_cells)
    obs = pandas.DataFrame(
        {"day": np.repeat(data.times, data.counts)[order], "fate": np.concatenate(data.labels)[order]},
        index=[str(i) for i in order],
    )
    adata = anndata.AnnData(obs=obs, obsm={"X_pca": np.concatenate(data.samples)[order]})
    back = Snapshots.from_anndata(adata, time="day", labels="fate")
    for i, rows in enumerate(back.index):
        restored = np.argsort(order[rows])
        np.testing.assert_array_equal(back.samples[i][restored], data.samples[i])
        assert back.labels[i][restored].tolist() == data.labels[i].tolist()
