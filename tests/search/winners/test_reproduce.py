"""What is a config that can be trained again; training one is part of test_journey.py."""

import copy
import json

import pytest
import yaml

from search.errors import SearchError
from search.sampling import seed_for
from search.view.progress import View
from search.winners.inference import read_metrics
from search.winners.reproduce import _jobs, read_config, train

CONFIG = {
    "study": "quickstart",
    "study_file": None,
    "trial": 3,
    "params": {"units": 3},
    "training": {
        "epochs": 3.98,
        "schedule_epochs": 4,
        "share": 1.0,
        "seeds": [5, 6],
        "precision": "float32",
        "images_per_report": 100,
        "batch_size": 32,
        "average_weights": True,
        "study_seed": 0,
    },
    "dataset": {"name": "digits", "reference": "digits", "sha256": "0" * 64},
    "validation": {"accuracy": 0.9},
    "test": {"mean": {"accuracy": 0.9}, "std": {"accuracy": 0.01}},
}


def write(folder, config):
    path = folder / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


def test_an_exported_config_is_read_whole(tmp_path):
    assert read_config(write(tmp_path, CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("study",), None),
        (("trial",), "three"),
        (("trial",), True),
        (("params",), [1]),
        (("training", "seeds"), 5),
        (("training", "share"), None),
        (("dataset", "sha256"), 7),
        (("test", "mean"), None),
        (("test",), "good"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, place, value):
    config = copy.deepcopy(CONFIG)
    *outer, last = place
    inner = config
    for key in outer:
        inner = inner[key]
    inner[last] = value
    name = "test.mean" if place == ("test",) else ".".join(place)
    with pytest.raises(SearchError, match=f"is no exported config: {name} is missing or of an"):
        read_config(write(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: [", "is no YAML file"),
        ("just words", "is no exported config: study"),
        ("", "is no exported config: study"),
        # Code in YAML is refused, not run.
        ("!!python/object/apply:os.system ['touch harm']", "is no YAML file"),
    ],
)
def test_another_file_is_refused(tmp_path, monkeypatch, text, rule):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SearchError, match=rule):
        read_config(write(tmp_path, text))
    assert not (tmp_path / "harm").exists()


def test_a_missing_file_says_where_configs_are(tmp_path):
    with pytest.raises(SearchError, match=r"can't be read: No such file.*configs/best.yaml"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("seeds", [[], ["a"], [True]])
def test_a_config_without_seeds_is_refused(tmp_path, seeds):
    config = CONFIG | {"training": CONFIG["training"] | {"seeds": seeds}}
    with pytest.raises(SearchError, match=r"training\.seeds is a list of whole numbers"):
        read_config(write(tmp_path, config))


def test_the_figures_of_another_config_are_not_overwritten(tmp_path):
    path, folder = write(tmp_path, CONFIG), tmp_path / "trained"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"config": CONFIG | {"trial": 4}}))
    with pytest.raises(SearchError, match=r"trained holds the figures of another config; take --"):
        train(path, folder, {}, View(-1))
    assert [file.name for file in folder.iterdir()] == ["metrics.json"]


def test_a_training_is_of_its_seed():
    assert [job.record["seed"] for job in _jobs(CONFIG, None, {})] == [5, 6]


def of_winner(index):
    return seed_for(0, "winner", CONFIG["trial"], index)


@pytest.mark.parametrize(
    ("stored", "num_seeds", "trained"),
    [
        ([0, 1], None, [0, 1]),
        ([0, 1], 1, [0]),
        ([0, 1], 4, [0, 1, 2, 3]),
        # One that diverged is not in the config: those that are keep their places.
        ([1, 2], None, [1, 2]),
        ([1, 2], 4, [1, 2, 0, 3]),
        ([0, 2], 5, [0, 2, 1, 3, 4]),
    ],
)
def test_more_seeds_are_others_than_those_of_the_config(stored, num_seeds, trained):
    seeds = [of_winner(index) for index in stored]
    config = CONFIG | {"training": CONFIG["training"] | {"seeds": seeds}}
    jobs = _jobs(config, num_seeds, {"precision": "float32"})
    assert [job.seed for job in jobs] == [of_winner(index) for index in trained]
    assert [job.index for job in jobs] == list(range(len(trained)))
    assert config["training"]["seeds"] == seeds


def test_a_run_without_metrics_says_what_to_do_first(tmp_path):
    with pytest.raises(SearchError, match=r"has no tested model yet.*Search and retrain first"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(SearchError, match=r"metrics.json can't be read"):
        read_metrics(tmp_path)
