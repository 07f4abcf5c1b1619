"""What the pool asks of an engine, wherever its workers run: local.py, ray.py."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from search.workers.devices import Device
from search.workers.protocol import Channel, Message


class Worker(Protocol):
    """One process of `search.workers.worker`; its channel ends when it does."""

    @property
    def channel(self) -> Channel: ...
    @property
    def pid(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def log(self) -> str | Path: ...
    def is_alive(self) -> bool: ...
    def kill(self) -> None:
        """End it now, whatever it does; returns when it is gone."""

    def was_killed(self) -> bool:
        """Whether it did not end by itself; call after `kill`."""

    def ran_out_of_memory(self) -> bool:
        """Whether there is evidence that it was killed for memory; ask once, if it was killed."""

    def post_mortem(self) -> str:
        """How it ended and the last lines that it wrote; call after `kill`."""


class Engine(Protocol):
    """Starts workers."""

    has_wide_workers: bool  # whether a worker may be given more threads than its device began with

    def devices(self, workers: str, per_gpu: int = 1) -> list[Device]:
        """One for each worker, as `devices.share_out`."""

    def joined(self) -> list[Device]:
        """One for each worker that there is room for since this was last asked."""

    def provide(self, settings: Message) -> Message:
        """Bring what a run reads to where workers run; its settings, as they are to get them."""

    def start(self, device: Device, slot: int) -> Worker: ...
    def close(self) -> None: ...
