import numpy as np
import pytest

from tests.benchmarks import cluster

COSTS = cluster.Costs(worker=0.001, report=0.004, trial=0.1)


def measured(workers, reports, trials):
    cpu = COSTS.cpu(workers, reports, trials)
    return cluster.Measured(workers, reports, trials, latencies=[0.01], cpu=cpu, memory=10**8)


def test_costs_are_found_in_what_was_measured():
    found = cluster.fit([measured(8, 2, 0.2), measured(8, 16, 0.1), measured(32, 30, 3)])
    assert found == pytest.approx(COSTS)


def test_one_worker_waits_for_its_own_report_alone():
    latencies = cluster.simulate(COSTS, 1, (1.0, 10), 100.0)
    assert latencies == pytest.approx([0.004 / 0.999] * len(latencies))
    assert len(latencies) == pytest.approx(75, abs=10)  # a quarter is left out


def test_answers_come_later_the_more_workers_there_are():
    p95 = [
        np.percentile(cluster.simulate(COSTS, workers, (3.0, 20), 300.0), 95)
        for workers in (10, 100, 200)
    ]
    assert p95[0] < p95[1] < p95[2]
    assert p95[0] < 0.11  # behind one trial's start at most
