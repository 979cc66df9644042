"""HTTP for sources: one client, ranges of files, and what can be told of a server that is not reached."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx2

from finetune_trainer.runtime.errors import TrainerError, Unavailable
from finetune_trainer.sources.base import Body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

TIMEOUT = httpx2.Timeout(60.0, connect=15.0)
"""Seconds: for a connection, and between two pieces of an answer."""
OK, PARTIAL_CONTENT = 200, 206
UNAUTHORIZED, PAYMENT_REQUIRED, FORBIDDEN, NOT_FOUND = 401, 402, 403, 404
CONFLICT, PRECONDITION_FAILED, TOO_LARGE, TOO_MANY = 409, 412, 413, 429
SERVER_ERRORS, INSUFFICIENT_STORAGE = 500, 507


def build_client(*, follow_redirects: bool = True) -> httpx2.Client:
    """A client for many threads. Proxies and authorities come from the environment."""
    return httpx2.Client(timeout=TIMEOUT, follow_redirects=follow_redirects)


@contextmanager
def open_range(
    client: httpx2.Client,
    url: str,
    start: int,
    refusal: Callable[[httpx2.Response], TrainerError],
    headers: Mapping[str, str] | None = None,
) -> Iterator[Body]:
    """The bytes of a file from an offset on; any other answer is told by `refusal`."""
    asked = {**(headers or {}), "Accept-Encoding": "identity"}
    if start:
        asked["Range"] = f"bytes={start}-"
    with client.stream("GET", url, headers=asked) as response:
        if response.status_code not in {OK, PARTIAL_CONTENT}:
            response.read()
            raise refusal(response)
        yield Body(_first_byte(response), response.iter_raw())


def _first_byte(response: httpx2.Response) -> int:
    if response.status_code == OK:
        return 0
    header = response.headers.get("Content-Range", "")
    if (found := re.match(r"bytes (\d+)-", header)) is None:
        msg = f"{response.url.host} answers with a part of a file, but not which ('{header}'). Try again later."
        raise Unavailable(msg)
    return int(found[1])


@contextmanager
def reaching(where: str, endpoint: str, remedy: str) -> Iterator[None]:
    """Tell a server that cannot be reached, or broke off, from every other trouble."""
    try:
        yield
    except httpx2.LocalProtocolError as error:  # its text may be a header of the request: a token, a signature
        msg = f"{where}: what is asked of {endpoint} cannot be sent ({type(error).__name__}). {remedy}"
        raise Unavailable(msg) from None
    except (httpx2.TransportError, httpx2.TooManyRedirects, TimeoutError) as error:
        msg = f"{where}: {endpoint} cannot be reached ({type(error).__name__}: {error}). {remedy}"
        raise Unavailable(msg) from error
    except httpx2.InvalidURL as error:
        msg = f"{where}: {endpoint} is no address ({error}). {remedy}"
        raise Unavailable(msg) from error


def is_passing(status: int) -> bool:
    """Whether a refusal says more of the server's state than of the question."""
    return status >= SERVER_ERRORS or status == TOO_MANY
