"""finetune-trainer prepare|train|merge|quantize|publish|evaluate|estimate --config job.json --work DIR.

One stage of a fine-tuning job, the same in a pod and on a workstation. Run them in that order with the same config
and work folder; a stage that is done already says so and ends at once, one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_trainer import launch
from finetune_trainer.config import GradientCheckpointing
from finetune_trainer.progress import ExitCode, LastWord, Reason, Stage, exit_code
from finetune_trainer.runtime import distributed, fence, manifest, stages
from finetune_trainer.runtime.context import IMPORTING, Context
from finetune_trainer.runtime.errors import InvalidConfig, TrainerError, VerificationFailed, translate
from finetune_trainer.runtime.farewell import say, shortened, write_last_word
from finetune_trainer.runtime.overrides import CHECKPOINTING_OPTION, MICRO_BATCH_OPTION, Overrides
from finetune_trainer.runtime.parsing import load_config
from finetune_trainer.runtime.report import Report, beating_with_bars, reporting
from finetune_trainer.runtime.work import WorkFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune_trainer.config import JobConfig
    from finetune_trainer.runtime.manifest import Manifest, Target

log = logging.getLogger(__name__)

EVALUATE, ESTIMATE = "evaluate", "estimate"
"""No stages of a job: they measure what is there, or tell what it takes. They have neither manifest nor last word."""
ASIDE = (EVALUATE, ESTIMATE)

COMMANDS = {
    Stage.PREPARE.value: "fetch and check the model, read and tokenize the rows, fix every setting that was left open",
    Stage.TRAIN.value: "train an adapter or the model itself; goes on from the newest good checkpoint",
    Stage.MERGE.value: "merge the adapter into the base",
    Stage.QUANTIZE.value: "make the quantized forms of the finished model",
    Stage.PUBLISH.value: "put artifacts where others fetch them: a hub, a bucket, a registry",
    EVALUATE: "measure every artifact that is there on the held-out rows",
    ESTIMATE: "tell what a GPU must have to train, from the model's config and the job's settings; needs no GPU",
}
ENTRIES = {Stage.QUANTIZE.value: "quantize", Stage.PUBLISH.value: "output.publish"}
"""Stages of which a config may ask for several, and the list that they stand in."""
EPILOG = """\
A config of several devices trains in several processes: train starts those of this machine itself.

exit codes:
""" + "\n".join(f"  {code.value:<3} {code.reason}: {code.meaning}" for code in ExitCode)
TERMINATION_LOG = Path("/dev/termination-log")
TRACEBACK_LINES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage and return its exit code."""
    arguments = build_parser().parse_args(argv)
    arguments.line = list(sys.argv[1:] if argv is None else argv)
    set_up_logging(arguments.command)
    stopping = threading.Event()
    with _stopped_by_signals(stopping):
        return _run(arguments, stopping)


def _run(arguments: argparse.Namespace, stopping: threading.Event) -> int:
    """Run the pieces of work that the command means, up to the first that fails."""
    try:
        config = load_config(arguments.config)
        names = _names(config, arguments)
    except Exception as error:  # noqa: BLE001 - every end is told
        return _end_badly(arguments, error)
    if arguments.command in ASIDE:
        return _run_aside(config, arguments, stopping)
    for name in names:
        if (code := _run_stage(config, arguments, name, stopping)) is not ExitCode.COMPLETED:
            return code
    return ExitCode.COMPLETED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, _ = (__doc__ or "").partition("\n\n")[2].partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="finetune-trainer",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        _add_sources(command)
        if name == ESTIMATE:
            _add_model(command)
            continue
        _add_options(command)
        if name in ENTRIES:
            whole = f"the entry of the config's {ENTRIES[name]} to work on (default: all of them)"
            command.add_argument("--name", help=whole)
        if name == Stage.TRAIN:
            _add_overrides(command)
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        MICRO_BATCH_OPTION,
        type=int,
        metavar="N",
        help="rows a forward pass on one device, in this run alone; steps keep their rows (default: as prepare fixed)",
    )
    command.add_argument(
        CHECKPOINTING_OPTION,
        choices=[each.value for each in GradientCheckpointing if each is not GradientCheckpointing.AUTO],
        help="compute activations again in the backward pass, in this run alone (default: as prepare fixed)",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.epilog = (
        "Rows are taken to be as long as training.maxLength allows. Where pod.gpuMemory says what a GPU has, the "
        "micro-batch and the checkpointing that are unset are chosen as prepare chooses them, and the exit code is "
        f"{ExitCode.OUT_OF_MEMORY.value} where nothing fits."
    )
    command.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="the model's config.json, or a folder that has it (default: of the config's source, from a hub that file "
        "alone)",
    )


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="the job's own folder; made if it is not there")
    add("--attempt", type=int, default=1, metavar="N", help="counts the tries of the job (default: %(default)s)")
    add("--progress-port", type=int, metavar="PORT", help="serve /progress, /metrics, /healthz (default: do not)")
    add(
        "--termination-log",
        type=Path,
        metavar="FILE",
        help=f"where the last word goes, as JSON (default: {TERMINATION_LOG} where it is writable)",
    )


def _add_sources(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the job as JSON: a FineTuneJob's spec, training half",
    )
    add(
        "--sources",
        type=Path,
        default=Path("/sources"),
        metavar="DIR",
        help="where the claims of volume sources are, one folder a claimName (default: %(default)s)",
    )
    add(
        "--secrets",
        type=Path,
        default=Path("/secrets"),
        metavar="DIR",
        help="where secrets are, one folder a source, tracker or place of output.publish: model/token, "
        "dataset-0/AWS_ACCESS_KEY_ID, wandb/key, publish-0/token (default: %(default)s)",
    )


def set_up_logging(command: str) -> None:
    """One format on stderr, with the time and the stage. Of the ranks the first is heard, and whose work goes wrong."""
    where = f"{command}" + (f"[{distributed.rank()}]" if "RANK" in os.environ else "")
    level = logging.INFO if distributed.leads() else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(asctime)s {where} %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )
    for noisy in ("httpx2", "gguf", "filelock", "urllib3", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; the report draws its own


@contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[None]:
    """SIGTERM, and the first Ctrl-C, ask the stage to leave in order; the second Ctrl-C breaks it off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: object) -> None:
        log.warning("%s: leaving as soon as what is done is safe", signal.Signals(number).name)
        stopping.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _names(config: JobConfig, arguments: argparse.Namespace) -> list[str | None]:
    """The entries of quantize or output.publish to work on; one nameless piece of work for every other stage."""
    if arguments.command not in ENTRIES:
        return [None]
    if arguments.name is not None:
        return [arguments.name]
    quantized = [entry.name for entry in config.quantize or ()]
    published = [entry.name for _, _, entry in config.destinations()]
    names = quantized if arguments.command == Stage.QUANTIZE else published
    if not names:
        msg = f"{ENTRIES[arguments.command]}: the config has no entry. Add one."
        raise InvalidConfig(msg)
    return list(names)


def _run_stage(config: JobConfig, arguments: argparse.Namespace, name: str | None, stopping: threading.Event) -> int:
    """Run a stage to its last word."""
    stage, work, began = Stage(arguments.command), WorkFolder(arguments.work.absolute()), time.monotonic()
    report = Report(stage, arguments.attempt)
    port = arguments.progress_port if distributed.leads() else None
    try:
        if stage is Stage.TRAIN and launch.is_parent(config):
            return _end(arguments, launch.run(config, arguments.line, arguments.attempt, stopping))
        with reporting(report, port), _together(config, arguments, report, stopping), ExitStack() as held:
            target = distributed.lead(lambda: _enter(config, arguments, name))
            alone = fence.alone(target.folder, arguments.attempt, stopping)
            distributed.lead(lambda: held.enter_context(alone))
            context = _context(arguments, report, target, name, stopping)
            found = distributed.lead(lambda: _done_already(target, work, report)) or _work(config, context, target)
            if distributed.leads():
                _tell_of_job(config, context, found, time.monotonic() - began)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every end is told
        return _end_badly(arguments, fence.explained(work.root, arguments.attempt, error))
    word = manifest.last_word(found, target, arguments.attempt)
    return _end(arguments, word.model_copy(update={"progress": report.current if word.training else None}))


def _tell_of_job(config: JobConfig, context: Context, found: Manifest, seconds: float) -> None:
    """Write the report of the job so far."""
    from finetune_trainer.reporting.write import write_job_report  # noqa: PLC0415 - brings numpy, slow for --help

    write_job_report(config, context, found, seconds)


def _context(
    arguments: argparse.Namespace,
    report: Report,
    target: Target | None,
    name: str | None,
    stopping: threading.Event,
) -> Context:
    """What the stage is given besides the config."""
    work = WorkFolder(arguments.work.absolute())
    return Context(
        work,
        arguments.sources,
        arguments.secrets,
        arguments.attempt,
        report,
        target,
        name,
        stopping,
        _overrides(arguments),
    )


def _overrides(arguments: argparse.Namespace) -> Overrides:
    """What this run does otherwise; nothing in all stages but train."""
    return Overrides(getattr(arguments, "micro_batch", None), getattr(arguments, "gradient_checkpointing", None))


@contextmanager
def _together(
    config: JobConfig, arguments: argparse.Namespace, report: Report, stopping: threading.Event
) -> Iterator[None]:
    """With the other ranks, if there are any."""
    device = "cuda" if config.gpus_per_node else "cpu"
    if distributed.world_size() > 1:
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or sharded weights would go where a GPU is
        report.begin(IMPORTING)
        importlib.import_module("finetune_trainer.models.loading").set_up_torch()  # before anybody imports torch
        report.begin("meeting the other processes")

    def leave(error: TrainerError) -> None:
        os._exit(_end_badly(arguments, error))  # the main thread may be stuck in a collective

    with distributed.joined(device, arguments.attempt, stopping, leave):
        yield


def _enter(config: JobConfig, arguments: argparse.Namespace, name: str | None) -> Target:
    """Make this the live attempt, and find what it is to make."""
    work = WorkFolder(arguments.work.absolute())
    fence.enter(work.root, arguments.attempt)
    target = stages.build_target(Stage(arguments.command), config, work, name)
    if target.stage is Stage.TRAIN:
        _overrides(arguments).applied(manifest.settings_in(work.data))  # refuse before anything is read or loaded
    return target


def _done_already(target: Target, work: WorkFolder, report: Report) -> Manifest | None:
    """The manifest of work that an earlier attempt finished, read again in full; None if it is to be made (again)."""
    try:
        if stages.finished(target) is None:
            return None
        for folder in stages.outputs_of(target, work):
            report.begin(f"{folder.name}/ is there already: verifying it", unit="bytes")
            found = manifest.verify(folder, report.bytes_progress)
    except VerificationFailed as error:
        log.warning("%s Making it anew.", error)
        return None
    return found


def _work(config: JobConfig, context: Context, target: Target) -> Manifest:
    """Verify what the stage reads, then run it."""
    distributed.lead(lambda: _verify_inputs(context, target))
    module = importlib.import_module(f"finetune_trainer.{target.stage.value}")
    with context.naming_rank(), beating_with_bars(context.report):
        made = module.run(config, context)
    if not isinstance(made, manifest.Manifest):
        msg = f"finetune_trainer.{target.stage.value}.run returned no manifest"
        raise TypeError(msg)
    return made


def _verify_inputs(context: Context, target: Target) -> None:
    for name, folder in stages.inputs_of(target, context.work).items():
        context.report.begin(f"verifying {name}/", unit="bytes")
        manifest.verify(folder, context.report.bytes_progress)


def _run_aside(config: JobConfig, arguments: argparse.Namespace, stopping: threading.Event) -> int:
    """Measure or estimate; prints tables, leaves nothing behind."""
    run = _evaluate if arguments.command == EVALUATE else _estimate
    try:
        run(config, arguments, stopping)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every end is told
        return _end_badly(arguments, error)
    return ExitCode.COMPLETED


def _evaluate(config: JobConfig, arguments: argparse.Namespace, stopping: threading.Event) -> None:
    report = Report(Stage.TRAIN, arguments.attempt)
    context = _context(arguments, report, None, None, stopping)
    with reporting(report, None):
        stages.build_target(Stage.TRAIN, config, context.work)
        importlib.import_module("finetune_trainer.evaluate").run(config, context)


def _estimate(config: JobConfig, arguments: argparse.Namespace, stopping: threading.Event) -> None:
    report = Report(Stage.PREPARE, 1)
    with tempfile.TemporaryDirectory() as folder, reporting(report, None):
        context = Context(WorkFolder(Path(folder)), arguments.sources, arguments.secrets, 1, report, stopping=stopping)
        module = importlib.import_module("finetune_trainer.estimate")
        sys.stdout.write(module.run(config, context, arguments.model) + "\n")


def _end_badly(arguments: argparse.Namespace, error: BaseException) -> int:
    """Tell why a stage cannot go on: known reasons in a sentence, others with their traceback in the log."""
    known = translate(error)
    reason = known.reason if known else Reason.UNKNOWN
    if known is None or known is not error:
        log.error("%s", "".join(traceback.format_exception(error)).rstrip())
    message = str(known) if known else describe_unknown(error)
    if arguments.command in ASIDE:
        say(message, reason)
        return exit_code(reason)
    return _end(
        arguments,
        LastWord(stage=Stage(arguments.command), attempt=arguments.attempt, reason=reason, message=shortened(message)),
    )


def describe_unknown(error: BaseException) -> str:
    """Type, text and the last lines of the traceback of an exception that nobody expected."""
    lines = [line.strip() for line in "".join(traceback.format_tb(error.__traceback__)).splitlines() if line.strip()]
    place = " | ".join(line for line in lines[-TRACEBACK_LINES:] if set(line) - set("^~"))
    return f"{type(error).__name__}: {error} (at {place}). The log has the whole traceback."


def _end(arguments: argparse.Namespace, word: LastWord) -> int:
    """Leave the last word where Kubernetes or the parent of the ranks finds it, tell people, and give the exit code."""
    if (for_parent := launch.own_word_path()) is not None:
        write_last_word(word, for_parent)
    elif distributed.leads():
        path = arguments.termination_log or (TERMINATION_LOG if os.access(TERMINATION_LOG, os.W_OK) else None)
        write_last_word(word, path)
        say(word.message, word.reason)
    return exit_code(word.reason)


if __name__ == "__main__":
    sys.exit(main())
