"""Runs a command, and ends it when the process that asked for it is gone, even by `kill -9`.

Run as a script of its own, which imports nothing of ours: it sees the other end of its standard
input be closed, whatever the reason.
"""

import os
import subprocess
import sys
import threading

WAIT = 30.0
"""Seconds that a command has to end by itself."""


def main() -> int:
    """Runs what the command line says; returns its exit status, as a shell would."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def end_with_the_other() -> None:
        os.read(0, 1)  # nothing is ever written
        command.terminate()
        try:
            command.wait(WAIT)
        except subprocess.TimeoutExpired:
            command.kill()

    threading.Thread(target=end_with_the_other, daemon=True).start()
    status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    os._exit(main())  # sys.exit would wait for the thread
