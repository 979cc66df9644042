"""No operator: a process that waits to be stopped."""

import signal

if __name__ == "__main__":
    signal.pause()
