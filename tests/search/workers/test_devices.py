"""What a worker may use: GPUs, cores and memory, as the machine and its control groups say."""

from __future__ import annotations

import pytest

from search import doctor
from search.errors import SearchError
from search.workers import cgroup, devices
from search.workers.devices import Device

LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-6fa7bf1a-1f4c-4d1f-9a0e-1c0a2f0b7d10)
"""


def test_a_gpu_that_is_divided_counts_by_its_instances():
    instances = [
        "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f",
        "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",
    ]
    assert devices._names(LISTING) == [*instances, "1"]
    assert devices._names("") == []


def smi(folder, script):
    """A driver's program that says this."""
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    smi(tmp_path, "echo 'GPU 0: a card (UUID: GPU-1)'; echo 'GPU 1: a card (UUID: GPU-2)'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "cores", lambda: 16)


@pytest.mark.parametrize(
    ("workers", "per_gpu", "shares"),
    [
        ("auto", 1, [1.0, 1.0]),
        ("auto", 3, [1 / 3] * 6),
        ("2", 1, [1.0, 1.0]),
        ("3", 1, [0.5, 1.0, 0.5]),
    ],
)
def test_workers_on_one_gpu_have_even_shares(two_gpus, workers, per_gpu, shares):
    found = devices.share_out(workers, per_gpu)
    assert [device.gpu for device in found] == ["0", "1", "0", "1", "0", "1"][: len(shares)]
    assert [device.share for device in found] == shares
    fractions = [d.environment().get("XLA_CLIENT_MEM_FRACTION") for d in found]
    assert fractions == [None if share == 1.0 else f"{0.9 * share:.3f}" for share in shares]


@pytest.mark.parametrize("per_gpu", [0, -1, 17, "2", 1.5])
def test_per_gpu_is_a_small_number(two_gpus, per_gpu):
    with pytest.raises(SearchError, match=f"from 1 to 16. Received: {per_gpu!r}"):
        devices.share_out(*devices.asked_for({"workers": None, "per_gpu": per_gpu}))


def test_per_gpu_is_refused_where_it_can_t_apply(two_gpus, monkeypatch):
    with pytest.raises(SearchError, match=r"--workers 4 is their number, so --per-gpu 2 can't"):
        devices.share_out("4", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SearchError, match="--per-gpu 2 can't apply: there is no GPU"):
        devices.share_out("auto", 2)


@pytest.mark.parametrize(
    ("share", "said", "megabytes"),
    [(0.5, "81559", 36701), (1.0, "81559", 0), (0.5, "[N/A]", 0), (0.5, "", 0)],
)
def test_a_worker_s_megabytes_of_a_shared_gpu(tmp_path, monkeypatch, share, said, megabytes):
    # Only where it is asked for the one GPU that is this worker's.
    smi(tmp_path, f"case \"$*\" in *--id=1*) echo '{said}';; esac")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in Device(1, "1", share=share).environment().items():
        monkeypatch.setenv(name, value)
    assert devices.gpu_memory() == megabytes


@pytest.mark.parametrize(
    ("visible", "script", "names"),
    [
        (None, 'case "$*" in *--id=0*) echo "a card, 80 GB";; *) echo "GPU 0: a card";; esac',
         ["a card, 80 GB"]),
        ("3", "exit 9", ["gpu 3"]),  # it may be used all the same
        (None, "echo no driver; exit 9", []),
        ("", "echo a card", []),
    ],
)  # fmt: skip
def test_doctor_s_names_of_gpus(tmp_path, monkeypatch, visible, script, names):
    smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert doctor.gpu_names() == names


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Makes control groups: what /proc/self/cgroup says, and files below /sys/fs/cgroup."""

    def group(groups: str, files: dict[str, str]):
        monkeypatch.setattr(cgroup, "ROOT", tmp_path / "fs")
        monkeypatch.setattr(cgroup, "GROUPS", tmp_path / "groups")
        (tmp_path / "groups").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return group


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ("0::/\n", {"cpu.max": "250000 100000\n", "memory.max": "1073741824\n"}, 2.5, 2**30),
        # A service: its slice has a limit of its own, and the smaller one holds.
        ("0::/my.slice/my.service\n",
         {"my.slice/cpu.max": "200000 100000\n", "my.slice/my.service/cpu.max": "800000 100000\n",
          "my.slice/memory.max": "max\n", "my.slice/my.service/memory.max": "1000\n"}, 2.0, 1000),
        # Version 1, in a container: the own group is the root of what is mounted.
        ("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n",
         {"cpu/cpu.cfs_quota_us": "150000\n", "memory/memory.limit_in_bytes": "2048\n"}, 1.5, 2048),
        ("5:cpu,cpuacct:/\n4:memory:/\n",
         {"cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"},
         None, None),
        ("", {}, None, None),
    ],
)  # fmt: skip
def test_limits_of_every_version_and_place(group, groups, files, cores, memory):
    group(groups, files)
    assert (cgroup.cores(), cgroup.memory()) == (cores, memory)


def test_workers_are_as_many_as_the_quota_lets_run(group, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: [])
    group("0::/\n", {"cpu.max": "100000 100000\n"})
    assert devices.cores() == 1
    assert len(devices.share_out("auto")) == 1


def test_kills_for_memory_are_those_of_the_own_group(group):
    events = "low 0\noom 9\noom_kill {}\n"
    group("0::/mine\n", {"mine/memory.events": events.format(3), "memory.events": events.format(7)})
    assert cgroup.oom_kills() == 3
    group("0::/\n", {"memory.events": "low 0\n"})
    assert cgroup.oom_kills() == 0


def test_a_kill_for_memory_is_evidence_once():
    kills = cgroup.OomKills(2)
    counts = (2, 3, 3, 5, 0, 1)  # 0: the group was made anew
    assert [kills.has_grown(count) for count in counts] == [False, True, False, True, False, True]
