"""Write the report: `report/report.json`, `report/index.html` and `report/serve/`, at the end of a stage.

A report is a convenience, the artifacts are the work: whatever goes wrong here is told in the log and fails nothing.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from finetune_trainer.config import CLAIM_VARIABLE, JOB_VARIABLE
from finetune_trainer.reporting import machine
from finetune_trainer.reporting.collect import collect, read_runs, with_run
from finetune_trainer.reporting.page import PAGE_NAME, build_page
from finetune_trainer.reporting.record import REPORT_NAME, StageRun
from finetune_trainer.reporting.serving import SERVE_FOLDER, plan_serving
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import JobConfig
    from finetune_trainer.runtime.context import Context
    from finetune_trainer.runtime.manifest import Manifest

log = logging.getLogger(__name__)


def write_job_report(config: JobConfig, context: Context, made: Manifest, seconds: float) -> None:
    """Tell all that is known now that a stage has ended with this manifest, `seconds` after its start."""
    try:
        run = _describe_run(context, made, seconds)
        with context.committing():  # a newer attempt may be writing, or has written
            _write(config, context, run)
    except Exception:
        log.warning("The report could not be written; what the stage made is whole.", exc_info=True)


def _describe_run(context: Context, made: Manifest, seconds: float) -> StageRun:
    return StageRun(
        stage=made.stage,
        name=context.name,
        attempt=context.attempt,
        message=made.result.message,
        digest=made.digest,
        finished_at=datetime.now(UTC),
        seconds=round(seconds, 1),
        peak_memory_bytes=machine.peak_memory_bytes(),
        peak_gpu_memory_bytes=machine.peak_gpu_memory_bytes(),
        machine=machine.describe_machine(),
        libraries=machine.library_versions(),
    )


def _write(config: JobConfig, context: Context, run: StageRun) -> None:
    folder = context.work.report
    report = collect(config, context.work, with_run(read_runs(folder), run), datetime.now(UTC))
    plans = plan_serving(report, context.work.root, os.environ.get(CLAIM_VARIABLE))
    serving = tuple(plan.told for plan in plans)
    report = report.model_copy(update={"resource": os.environ.get(JOB_VARIABLE), "serving": serving})
    _write_serving(folder / SERVE_FOLDER, {plan.name: plan.text for plan in plans if plan.text is not None})
    write_report(folder / PAGE_NAME, build_page(report))
    write_report(folder / REPORT_NAME, report.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")


def _write_serving(folder: Path, texts: dict[str, str]) -> None:
    """The manifests of what is there, and no others."""
    for name, text in texts.items():
        write_report(folder / name, text)
    for path in folder.glob("*.yaml"):
        if path.name not in texts:
            path.unlink()
