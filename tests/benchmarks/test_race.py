import math
import time

import pytest

from tests.benchmarks import race

HYPERBAND = {
    1: [(60.0, 0.80), (300.0, 0.89), (1200.0, 0.89)],
    2: [(90.0, 0.85), (600.0, 0.90), (1200.0, 0.90)],
    3: [(60.0, 0.85), (900.0, 0.91), (1200.0, 0.91)],
}
OURS = {1: [(30.0, 0.88), (100.0, 0.92), (1200.0, 0.92)]}


@pytest.fixture
def folder(tmp_path):
    for name, by_seed in (("kerastuner-hyperband", HYPERBAND), ("ours", OURS)):
        for seed, curve in by_seed.items():
            lines = ["seconds,accuracy", *(f"{at},{value}" for at, value in curve)]
            (tmp_path / f"{name}-{seed}.csv").write_text("\n".join(lines))
    return tmp_path


def test_curves_are_read_by_contender_and_seed_ours_first(folder):
    curves = race.read(folder)
    assert list(curves) == ["ours", "kerastuner-hyperband"]
    assert curves["kerastuner-hyperband"] == HYPERBAND


@pytest.mark.parametrize(
    ("seconds", "value"), [(10, 0.0), (60, 0.8), (299, 0.8), (300, 0.89), (1200, 0.89)]
)
def test_accuracy_after_some_time(seconds, value):
    assert race.at(HYPERBAND[1], seconds) == value


def test_nothing_is_known_of_the_time_after_a_race():
    assert math.isnan(race.at(HYPERBAND[1], 1201))


def test_time_to_a_target_is_the_median_and_never_is_infinite():
    assert race.time_to(HYPERBAND[1], 0.81) == 300
    assert race.median_time(HYPERBAND, 0.89) == 600
    assert race.median_time(HYPERBAND, 0.9) == 900
    assert race.median_time(HYPERBAND, 0.91) == math.inf


def test_targets_are_steps_and_what_peers_end_with(folder):
    labels = [label for label, _ in race.targets(race.read(folder))]
    assert labels[:2] == ["86.0%", "86.5%"]
    assert labels[-2:] == ["92.0%", "90.00%, kerastuner-hyperband's end"]


def test_the_table_says_times_and_ratios(folder):
    head, *rows = race.time_rows(race.read(folder))
    assert head == ["seconds to", "ours", "kerastuner-hyperband"]
    by_target = {row[0]: row[1:] for row in rows}
    assert by_target["88.0%"] == ["30", "600 (20.0x)"]
    assert by_target["92.0%"] == ["100", "never"]
    assert by_target["90.00%, kerastuner-hyperband's end"] == ["100", "900 (9.0x)"]


def test_the_table_says_accuracies_by_the_minute(folder):
    head, ours, hyperband = race.accuracy_rows(race.read(folder))
    assert head[:3] == ["after minutes", "1", "2"]
    assert ours[1:3] == ["88.00%", "92.00%"]
    assert hyperband[1:] == [
        *("80.00%", "85.00%", "85.00%", "89.00%", "90.00%", "90.00%"),
        *("89.00%-91.00%", "3"),
    ]


def test_the_end_of_two_is_one_that_half_of_them_reach(folder):
    (folder / "kerastuner-hyperband-3.csv").unlink()
    rows = {row[0]: row[1:] for row in race.time_rows(race.read(folder))}
    assert rows["89.00%, kerastuner-hyperband's end"] == ["100", "450 (4.5x)"]


def test_of_a_race_that_was_shorter_nothing_is_said_beyond_it(folder):
    (folder / "ours-2.csv").write_text("seconds,accuracy\n60,0.8\n120,0.8")
    _, ours, _ = race.accuracy_rows(race.read(folder))
    assert ours[1:7] == ["84.00%", "86.00%", "", "", "", ""]


def test_table_and_figure_are_made(folder, capsys):
    race.show(folder)
    assert "9.0x" in capsys.readouterr().out
    assert "kerastuner-hyperband" in (folder / "race.html").read_text()


def test_a_log_keeps_what_was_reached_in_time(tmp_path):
    path = tmp_path / "optuna-1.csv"
    began = time.time() - 100
    log = race.Log(path, began, 60.0)
    for value, at in ((0.7, 10), (0.6, 20), (0.8, 30), (0.9, 61)):
        log.add(value, began + at)
    assert not path.exists()
    log.finish()
    assert race.read(tmp_path) == {"optuna": {1: [(10, 0.7), (30, 0.8), (60, 0.8)]}}
