"""Runs a command, and ends it when the process that asked for it is gone, even by `kill -9`.

Run as a script of its own, which imports nothing of ours: it sees the other end of its standard
input be closed, whatever the reason. What the command has started itself is ended with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

WAIT = 30.0
"""Seconds that a command has to end by itself."""


def main() -> int:
    """Runs what the command line says; returns its exit status, as a shell would."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    ended = threading.Event()

    def end_with_the_other() -> None:
        os.read(0, 1)  # nothing is ever written
        ended.set()
        end(command, forced=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(WAIT)
        end(command, forced=True)

    threading.Thread(target=end_with_the_other, daemon=True).start()
    status = command.wait()
    if ended.is_set():
        end(command, forced=True)  # what is left of its processes
    return status if status >= 0 else 128 - status


def end(command: "subprocess.Popen[bytes]", forced: bool) -> None:
    """Signals a command and the processes that it has started."""
    if os.name != "posix":
        return command.kill()
    with contextlib.suppress(OSError):  # there is none left
        os.killpg(command.pid, signal.SIGKILL if forced else signal.SIGTERM)
    return None


if __name__ == "__main__":
    os._exit(main())  # sys.exit would wait for the thread
