"""The command line, killed by its own SIGKILL right after its n-th write to the storage.

    python -m tests.killed N --study tests/dummy.py --trials 4

Stands at the process's border: Optuna's storage does what it always does, and then the power goes.
"""

import os
import signal
import sys

from optuna.storages import RDBStorage

WRITES = (
    "create_new_trial",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_state_values",
    "set_study_user_attr",
    "set_study_system_attr",
)


def main():
    fatal = int(sys.argv.pop(1))
    done = 0

    def counted(write):
        def write_and_count(*args, **kwargs):
            nonlocal done
            answer = write(*args, **kwargs)
            done += 1
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return write_and_count

    for name in WRITES:
        setattr(RDBStorage, name, counted(getattr(RDBStorage, name)))
    from search.cli import main as command_line

    command_line()


main()
