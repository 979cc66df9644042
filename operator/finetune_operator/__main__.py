"""finetune-operator: turns FineTuneJobs into stage Jobs. Settings come from the environment; --help lists them."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from functools import partial
from typing import NoReturn

import uvloop

from finetune_operator import logs
from finetune_operator.settings import PREFIX, Settings, SettingsError


def main() -> int:
    """Run until SIGTERM or SIGINT; exit code 2 for an environment that makes no sense."""
    parse_arguments()
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before logs are configured
        return 2
    logs.configure(settings.log_level, settings.log_format)
    uvloop.run(serve(settings))
    return 0


def parse_arguments() -> None:
    """There is nothing to parse but --help."""
    parser = argparse.ArgumentParser(
        prog="finetune-operator",
        description="Turns FineTuneJobs into stage Jobs on the cluster of the pod's service account or the kubeconfig.",
        epilog=describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()


def describe_settings() -> str:
    """Every environment variable with its default."""
    lines = ["environment:"]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  {PREFIX}{name.upper()} ({default})  {field.description or ''}".rstrip())
    return "\n".join(lines)


async def serve(settings: Settings) -> None:
    """The operator, stopped by a signal."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # First of all: PID 1 of a container does not hear what it does not handle.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    from finetune_operator.handlers import run  # noqa: PLC0415 - --help and a bad environment need no kopf

    await run(settings, stop, partial(start_anew, stop))


def start_anew(stop: asyncio.Event) -> NoReturn:
    """End whatever this process does, at once, and begin as a fresh one under the same PID.

    To exit would mean CrashLoopBackOff in a pod, just while the API server is away. Who was told to stop stops.
    """
    logging.shutdown()
    if stop.is_set():
        os._exit(0)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - its own command


if __name__ == "__main__":
    sys.exit(main())
