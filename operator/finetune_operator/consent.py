"""What no schema can judge before a job begins: what the administrator allows, and the claim it brings. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from urllib.parse import SplitResult, unquote, urlsplit

from finetune_operator.api import AccessMode, Spec
from finetune_operator.facts import Facts
from finetune_operator.failures import Failure, waiting
from finetune_operator.reasons import Reason
from finetune_operator.settings import Settings
from finetune_trainer.config import OciSource, S3Source

PUBLIC_WANDB = "https://api.wandb.ai"
"""Where data goes, or comes from, if the spec names no address; S3 in any of its regions."""

NEW_NAME = "then apply the job under a new name."


def objection(facts: Facts, settings: Settings) -> Failure | None:
    """Why a job must not begin, or None. One that has begun is not asked about any more."""
    if facts.jobs or facts.job.status.attempts:
        return None
    spec = facts.job.valid_spec
    objections = (_remote_code(spec, settings), *_addresses(spec, settings), _claim(spec, facts.claim_modes))
    return next((found for found in objections if found is not None), None)


def _remote_code(spec: Spec, settings: Settings) -> Failure | None:
    if not spec.model.trust_remote_code or settings.allow_remote_code:
        return None
    what = "spec.model.trustRemoteCode: this cluster does not run code that a model brings"
    remedy = "Ask its administrator to set trainer.allowRemoteCode in the operator's chart, or leave the field out, "
    return waiting(Reason.NOT_ALLOWED, what, remedy + NEW_NAME)


def _addresses(spec: Spec, settings: Settings) -> Iterator[Failure | None]:
    for field, address in addresses(spec):
        if not settings.endpoints or any(lies_below(address, allowed) for allowed in settings.endpoints):
            continue
        what = f"spec.{field}: {address} is not among the addresses that this cluster allows"
        known = f"Use one below {', '.join(settings.endpoints)}, or ask its administrator for trainer.endpoints, "
        yield waiting(Reason.NOT_ALLOWED, what, known + NEW_NAME)


def addresses(spec: Spec) -> Iterator[tuple[str, str]]:
    """Field and URL of everything a job reaches at an address of its own choice."""
    sources = ((field, source.kind) for _, field, source in spec.sources())
    targets = ((field, entry.kind) for _, field, entry in spec.destinations())
    for field, kind in (*sources, *targets):
        if isinstance(kind, S3Source):
            yield f"{field}.s3.endpoint", kind.address
        if isinstance(kind, OciSource):
            yield f"{field}.oci.reference", f"{'http' if kind.plain_http else 'https'}://{kind.reference}"
    tracking = spec.tracking
    if tracking is not None and tracking.wandb is not None and tracking.wandb.api_key_secret_ref is not None:
        yield "tracking.wandb.baseUrl", tracking.wandb.base_url or PUBLIC_WANDB
    if tracking is not None and tracking.mlflow is not None:
        yield "tracking.mlflow.uri", tracking.mlflow.uri


def lies_below(address: str, allowed: str) -> bool:
    """Whether a URL is an allowed one or below it: same scheme, host and port, a path that begins with its parts."""
    there, root = urlsplit(address), urlsplit(allowed)
    if _origin(there) is None or _origin(there) != _origin(root):
        return False
    begin = _path(root).rstrip("/")
    return _path(there) == begin or _path(there).startswith(f"{begin}/")


def _origin(url: SplitResult) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for a URL that hides its host behind a user's name, or has no port that is one."""
    try:
        port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    except ValueError:
        return None
    return (url.scheme, url.hostname, port) if url.hostname and "@" not in url.netloc else None


def _path(url: SplitResult) -> str:
    """The path that a server would see: no `..`, nothing escaped."""
    return posixpath.normpath(f"/{unquote(url.path).lstrip('/')}")


def _claim(spec: Spec, modes: tuple[str, ...] | None) -> Failure | None:
    if spec.num_nodes == 1 or modes is None or AccessMode.READ_WRITE_MANY in modes:
        return None
    what = (
        f"spec.output.volume.existing.claimName: claim {spec.existing_claim} is {', '.join(modes)}, and pods on "
        f"{spec.num_nodes} nodes (parallelism.numNodes) must share it"
    )
    return waiting(Reason.INVALID_SPEC, what, f"Use a claim with ReadWriteMany, {NEW_NAME}")
