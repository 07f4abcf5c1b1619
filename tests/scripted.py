"""A pool whose workers say what a test has written down: no process, no Keras."""

import socket
from types import SimpleNamespace

from search.errors import Interrupted
from search.workers.devices import Device
from search.workers.slots import OUT_OF_MEMORY, Event, Slot, Task

ONE_CORE = Device(threads=1)
LOST = {"type": "lost", "kind": "killed"}
LOST_FOR_MEMORY = {"type": "lost", "kind": OUT_OF_MEMORY}
CRASH = {"type": "crash"}  # of the coordinator itself


class ScriptedPool:
    """Workers that say, one word at each poll, what `script(trial, attempt)` yields."""

    def __init__(self, script, num_slots=1, device=ONE_CORE):
        self.slots = [Slot(index, device) for index in range(num_slots)]
        for slot in self.slots:
            slot.worker = SimpleNamespace(pid=100 + slot.index, host=socket.gethostname())
        self.given = []
        self.at_start = self.at_answer = lambda: None
        self._script = script
        self._saying = {}
        self._answers = {}

    def idle(self):
        return [slot for slot in self.slots if slot.task is None]

    def give(self, slot, trial, attempt, content, timeout=None, *, alone=False):
        assert not alone or self.busy() == []
        self.at_start()
        self.given.append((trial, attempt, content))
        slot.task = Task(trial, attempt, content)
        self._saying[slot.index] = self._script(trial, attempt)
        self._answers[slot.index] = None

    def busy(self):
        return [slot for slot in self.slots if slot.task is not None]

    def shares_memory(self, slot):
        return slot.device.gpu is None

    def can_widen(self):
        return True

    def give_threads(self, slot, threads):
        slot.device = Device(threads, slot.device.gpu)

    def drop_tasks(self):
        for slot in self.slots:
            slot.task = None

    def answer(self, slot, **content):
        self.at_answer()
        self._answers[slot.index] = content

    def poll(self, timeout):
        for slot in self.busy():
            task = slot.task
            message = self._saying[slot.index].send(self._answers[slot.index])
            if message == CRASH:
                raise Interrupted(9)
            if message["type"] in ("finished", "lost"):
                slot.task = None
            lost = "ended by signal 9\nlast words" if message["type"] == "lost" else None
            yield Event(slot, message, lost=lost, task=task, kind=message.get("kind", ""))
