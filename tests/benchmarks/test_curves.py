import json
from argparse import Namespace

import numpy as np
import pytest

from tests.benchmarks import curves, replay


def point(accuracy, *, reports=24):
    report = {"accuracy": accuracy, "loss": 0.4, "train": 2.0, "measure": 0.5, "at": 3.0}
    return {
        "params": {"optimizer": "adam", "filters": round(100 * accuracy)},
        "parameters": 10,
        "flops": 1e6,
        "start": 1.5,
        "reports": [report] * reports,
        "epochs": [accuracy] * (reports // curves.REPORTS_PER_EPOCH),
        "final": 0.7,
    }


@pytest.fixture
def given(tmp_path):
    """What `pack` is given; its folder has the points 1 and known 0."""
    for name, accuracy in (("0001", 0.8), ("known-00", 0.9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(point(accuracy)))
    return Namespace(folder=tmp_path, table=tmp_path / "data" / "curves.npz")


def test_packing_adds_a_folders_points_to_the_table(given, capsys):
    curves.pack(given)
    (given.folder / "0001.json").unlink()  # another machine's folder
    (given.folder / "0000.json").write_text(json.dumps(point(0.7, reports=5)))
    curves.pack(given)
    assert capsys.readouterr().out.splitlines()[1].startswith("1 points added; 3 in all, ")
    table = curves.stored(given.table)
    assert table["name"].tolist() == ["0000", "0001", "known-00"]
    assert table["known"].tolist() == [False, False, True]
    assert table["monitor"].shape == (3, 24)
    assert np.isfinite(table["monitor"]).sum(1).tolist() == [5, 24, 24]  # the first diverged
    assert table["val"][:, 0] == pytest.approx([0.7, 0.8, 0.9])
    searched = replay.read(given.table)
    assert searched.params[2]["filters"] == 90
    assert searched.final.tolist() == pytest.approx([0.0, 0.8, 0.9])


def test_a_table_of_another_space_is_kept(given):
    curves.pack(given)
    table = curves.stored(given.table)
    np.savez_compressed(given.table, **table | {"space": "[]"})
    with pytest.raises(SystemExit, match="another space"):
        curves.pack(given)
    assert str(curves.stored(given.table)["space"]) == "[]"
