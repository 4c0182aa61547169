"""Asks this user's running gateway, or the one that BIOLLM_GATEWAY names, with the standard library alone.

OpenAI's own client takes longer to import than an answer should take. Before anything is sent, the folder, the socket
and the listening process must belong to this user alone.
"""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from functools import cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from biollm import __version__, errors
from biollm._ownership import is_local, is_private, objection
from biollm.config.paths import FALSE, config_dirs, state_dir
from biollm.inputs.normalize_log import names_of
from biollm.providers.gateway_key import is_gateway_key
from biollm.routing.answers import Fold, content, delta_of, kind, last_chunk, tool_calls
from biollm.types import (
    DATA_POLICIES,
    Attempt,
    Completion,
    Fields,
    Json,
    Piece,
    StreamChunk,
    StreamRestarted,
    Usage,
    known,
    part,
)

if TYPE_CHECKING:
    from biollm.config import Cluster
    from biollm.routing.request import Request

Dial = Callable[[], HTTPConnection]
_MOST = 1_000_000  # tokens of an attachment that a gateway is sent; it cuts them to what fits each deployment
_LOOK, _PATIENCE = 10.0, 10.0  # seconds between two health checks while a gateway works, and for it to answer one
_GRACE = 0.5  # seconds past the deadline in which the gateway may still report itself what was tried
_OFF = "BIOLLM_GATEWAY=off runs without a gateway."
SOCKET, RECORD = "gateway.sock", "gateway.json"
PARAMETERS = {  # of OpenAI's API, which a gateway takes as they are
    "frequency_penalty", "logit_bias", "max_tokens", "parallel_tool_calls", "presence_penalty", "reasoning_effort",
    "seed", "stop", "temperature", "tool_choice", "tools", "top_p", "user", "verbosity",
}  # fmt: skip


def folders() -> list[Path]:
    """Return where a gateway's socket may lie: in XDG_RUNTIME_DIR, which cron and Slurm's jobs lack, or in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [*([Path(runtime) / "biollm"] if runtime else []), Path(f"/tmp/biollm-{os.getuid()}")]  # noqa: S108


def identity() -> Json:
    """Return what a gateway and its caller must have in common: version, state folder, and every configuration file."""
    files: list[Any] = []
    for path in (folder / f"{name}.yaml" for _, folder in config_dirs() for name in ("models", "providers", "cluster")):
        with suppress(OSError):
            at = path.stat()
            files.append([str(path.absolute()), at.st_ino, at.st_size, at.st_mtime_ns])
    return {"version": __version__, "state": str(state_dir().absolute()), "files": files}


def record(folder: Path) -> Json | None:
    """Return the record of the gateway in this folder; None if there is none."""
    try:
        told = json.loads((folder / RECORD).read_text()) if is_private(folder) else None
    except (OSError, ValueError):
        return None
    return cast("Json", told) if isinstance(told, dict) else None


def connect(path: Path) -> socket.socket:
    """Return a connection to a socket of this user.

    Raises:
        OSError: Nothing listens there, or not this user alone.
    """
    if not (is_private(path.parent) and is_private(path, stat.S_ISSOCK)):
        raise PermissionError(f"{path} is not private.")
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(str(path))
        if struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] != os.getuid():
            raise PermissionError(f"Another user listens at {path}.")
    except OSError:
        line.close()
        raise
    return line


def named() -> str | None:
    """Return the URL in BIOLLM_GATEWAY, or None.

    Raises:
        UsageError: It is neither a URL nor off.
    """
    where = os.environ.get("BIOLLM_GATEWAY", "")
    if where.lower() in ("", *FALSE):
        return None
    if not where.startswith(("http://", "https://")):
        raise errors.UsageError(f"BIOLLM_GATEWAY is {where!r}; it must be a URL, or off.")
    return where.rstrip("/").removesuffix("/v1")


def reach(body: Json | None, mine: Json | None = None, cluster: Cluster | None = None) -> Connection | None:
    """Return a connection for one request, or None where it must be answered in this process.

    Args:
        body: From `body_of`; None cannot be sent to a gateway.
        mine: The caller's `identity`, if it was taken when its configuration was read.
        cluster: Names local hosts and trusted owners of servers; without it, loopback and the user's own.

    Raises:
        UsageError: BIOLLM_GATEWAY is neither a URL nor off.
        UnavailableError: The gateway that it names may not receive the prompt or the key. Nothing was sent.
    """
    if body is None:
        return None
    if url := named():
        dial, headers = _by_url(url, body["biollm"].get("data_policy"), cluster)
        return Connection(dial(), dial, headers, body)
    for folder in [] if (found := nearby(mine)) is None else [found]:
        with suppress(OSError):
            return Connection(_dial(folder), partial(_dial, folder), {}, body)
    return None


def nearby(mine: Json | None = None) -> Path | None:
    """Return the folder of this user's gateway on this host, if it has this configuration and its keys."""
    if os.environ.get("BIOLLM_GATEWAY", "").lower() in FALSE:
        return None
    for folder in folders():
        if found := record(folder):
            with suppress(OSError):
                connect(folder / SOCKET).close()
                new = [name for name in found.get("lacks", ()) if _is_provider_key(os.environ.get(name))]
                if found.get("identity") != (mine or identity()):
                    _warn("with another configuration or version")
                elif new:
                    _warn(f"without {', '.join(new)}")
                else:
                    return folder
    return None


def _is_provider_key(key: str | None) -> bool:
    """Return whether a variable holds a key; `biollm run` gives agents one of the gateway's in OPENAI_API_KEY."""
    return bool(key) and not is_gateway_key(key, state_dir())


def _dial(folder: Path) -> HTTPConnection:
    connection = HTTPConnection("localhost")
    connection.sock = connect(folder / SOCKET)
    return connection


@cache
def _warn(how: str) -> None:
    """Warn once that the gateway was started in a way in which it cannot answer for this process."""
    import logging

    text = "The gateway was started %s and is not used. Restart it (biollm serve stop; biollm serve --detach). %s"
    logging.getLogger("biollm").warning(text, how, _OFF)


def _by_url(url: str, policy: str | None, cluster: Cluster | None) -> tuple[Dial, dict[str, str]]:
    from http.client import HTTPSConnection
    from urllib.parse import urlsplit

    parts, key = urlsplit(url), os.environ.get("BIOLLM_GATEWAY_KEY")
    hosts, owners = (cluster.local_hosts, cluster.trusted_owners) if cluster else ((), ())
    if policy == "local_only" and not is_local(url, hosts):
        why = f"the data policy is local_only, and {parts.hostname} is neither this machine nor in local_hosts of cluster.yaml"
        raise errors.UnavailableError(f"BIOLLM_GATEWAY is not used: {why}.", hint=_OFF)
    if why := objection(url, local_hosts=hosts, trusted_owners=owners):
        raise errors.UnavailableError(f"BIOLLM_GATEWAY is not used: {why}.", hint=_OFF)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    dial = partial(kind, parts.hostname or "", parts.port, timeout=_PATIENCE)
    return dial, {"Authorization": f"Bearer {key}"} if key else {}


def model(url: str, key: str, name: str, policy: str, cluster: Cluster) -> Json:
    """Return what the gateway at `url` states of a model.

    Raises:
        UnavailableError: It may not receive the key, does not answer, or refuses the key.
        BiollmError: It has no such model.
    """
    from urllib.parse import quote

    dial, _ = _by_url(url, policy, cluster)
    try:
        with closing(dial()) as connection:
            connection.request("GET", f"/v1/models/{quote(name)}", headers={"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            found: Json = json.loads(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise errors.UnavailableError(f"The gateway at {url} does not answer: {error}.") from None
    if response.status != 200:
        raise _error(found.get("error"), status=response.status)
    return found


def body_of(request: Request) -> Json | None:
    """Return the body that asks a gateway the same; None where something in the request cannot be sent."""
    schema, requirements = request.schema, request.requirements
    # A class may check more than its schema says, and must see the answer while it can still be asked for again.
    stays = schema and (not isinstance(schema.wanted, Mapping) or requirements.tools)
    names = names_of(request.cache_key) if request.cache_key else None
    if request.cache and request.cache_key and names is None:
        return None
    if stays or request.on_send or request.on_note or request.on_state or request.params.keys() - PARAMETERS:
        return None
    ours = {
        "provider": requirements.provider, "data_policy": requirements.policy, "capability": requirements.capability,
        "allow_degraded": requirements.allow_degraded, "timeout": request.timeout, "deadline": request.deadline,
        "fallback": request.fallback, "max_retries": request.max_retries, "tags": dict(request.tags),
        "on_interrupt": request.on_interrupt, "start_local": request.start, "wait": request.wait,
        "patience": request.patience, "redact": request.redact, "redact_names": list(request.redact_names) or None,
        "cache": request.cache or None, "cache_similar": names or (None if names is None else True),
        "attachments": [{"name": each.name, "text": each.cut(_MOST).text} for each in request.attachments] or None,
    }  # fmt: skip
    body: Json = {**request.params, "model": requirements.model or "biollm"}
    if schema:
        body["response_format"] = schema.response_format
    if request.middle:
        body["prompt"], body["suffix"] = request.middle
    else:
        body["messages"] = request.messages
    return {**body, "biollm": {name: value for name, value in ours.items() if value is not None}}


class Connection:
    """A connection to a gateway, for one request. `close` ends it from any thread.

    It ends at the request's deadline, and when the gateway no longer answers.
    """

    def __init__(self, connection: HTTPConnection, dial: Dial, headers: Mapping[str, str], body: Json) -> None:
        self._connection, self._dial_again, self._headers, self._asked = connection, dial, headers, body
        self._socket, self._left, self._over = connection.sock, False, threading.Event()
        self._why: errors.CompletionError | None = None

    def close(self) -> None:
        """Disconnect; the gateway then cancels the request."""
        self._left = True
        with suppress(OSError, AttributeError):  # AttributeError: it is being connected
            self._socket.shutdown(socket.SHUT_RDWR)

    def complete(self) -> Completion:
        """Return the answer.

        Raises:
            BiollmError: The one that the gateway met, or CompletionError when it broke off.
        """
        try:
            told = json.loads(self._ask({}).read())
        except (OSError, HTTPException, ValueError) as error:
            raise self._why or errors.CompletionError(f"The gateway broke off: {error}.", hint=_OFF) from None
        finally:
            self._over.set()
            self._connection.close()
        return self._completion(told, content(told["choices"][0]))

    def stream(self) -> Iterator[Piece]:
        """Yield the answer as it comes; the last piece holds the Completion.

        Raises:
            BiollmError: The one that the gateway met, or InterruptedStreamError when it broke off.
        """
        text, end, why, fold = "", cast("Json", {}), "before its end", Fold()
        try:
            more = {"stream": True, "stream_options": {"include_usage": True}}
            response = self._ask(more)
            degraded = response.headers.get("x-biollm-degraded") == "true"
            for told in _events(response):
                if told is None:
                    completion = self._completion({**fold.whole(), "biollm": end["biollm"]}, text)
                    yield StreamChunk("", completion, "usage", last_chunk(completion))
                    return
                if "error" in told:
                    raise _error(told["error"], partial=text)
                if again := told.get("biollm", {}).get("restarted"):
                    text, fold = "", Fold()
                    yield StreamRestarted(known(Attempt, again["attempt"]))
                fold.add(told)
                if (adds := kind(told)) != "usage":
                    new = delta_of(told).get("content") or ""
                    text += new
                    yield StreamChunk(new, None, adds, told, degraded)
                if told.get("usage"):
                    end = told
        except (OSError, HTTPException, ValueError) as error:
            why = str(error)
        finally:
            self._over.set()
            self.close()
            self._connection.close()
        if self._why and (isinstance(self._why, errors.DeadlineError) or not text):
            raise self._why
        why = str(self._why or why).rstrip(".")
        raise errors.InterruptedStreamError(f"The gateway broke off: {why}.", (), partial=text)

    async def acomplete(self) -> Completion:
        """Like `complete`; cancelling it disconnects."""
        async with aclosing(self._apart(lambda: iter([self.complete()]))) as answers:
            return await anext(answers)

    def astream(self) -> AsyncGenerator[Piece, None]:
        """Like `stream`."""
        return self._apart(self.stream)

    async def _apart(self, items: Callable[[], Iterator[Any]]) -> AsyncGenerator[Any, None]:
        """Yield from an iterator that runs in a thread of its own, as a pool would hold up the seventh caller."""
        import asyncio
        import threading

        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def pump() -> None:
            with suppress(RuntimeError):  # the caller's loop is closed
                try:
                    for item in items():
                        loop.call_soon_threadsafe(inbox.put_nowait, (item, None))
                except BaseException as error:
                    loop.call_soon_threadsafe(inbox.put_nowait, (None, error))
                else:
                    loop.call_soon_threadsafe(inbox.put_nowait, (None, None))

        threading.Thread(target=pump, daemon=True).start()
        try:
            while (item := await inbox.get()) != (None, None):
                if item[1]:
                    raise item[1]
                yield item[0]
        finally:
            self.close()

    def _ask(self, more: Json) -> HTTPResponse:
        """Send the request; return the response once its status says that there is an answer."""
        threading.Thread(target=self._watch, args=(time.monotonic(),), name="biollm-gateway", daemon=True).start()
        if self._socket is None:
            self._dial()
        headers = {"Content-Type": "application/json", "x-biollm-restarts": "taken", **self._headers}
        path = "/v1/completions" if "prompt" in self._asked else "/v1/chat/completions"
        self._connection.request("POST", path, json.dumps({**self._asked, **more}), headers)
        response = self._connection.getresponse()
        if response.status != 200:
            told: Any = None
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(response.read())["error"]
            raise _error(told, status=response.status)
        asked, honoured = self._asked["biollm"].get("data_policy", "any"), response.headers.get("x-biollm-policy")
        if honoured not in DATA_POLICIES[DATA_POLICIES.index(asked) :]:
            raise errors.CompletionError(f"The gateway does not confirm the data policy {asked}.", hint=_OFF)
        return response

    def _watch(self, began: float) -> None:
        """Disconnect when the deadline has passed, or the gateway does not answer a health check."""
        deadline: float | None = self._asked["biollm"].get("deadline")
        end = began + deadline + _GRACE if deadline else math.inf
        while not self._over.wait(max(0.0, min(_LOOK, end - time.monotonic()))):
            if time.monotonic() >= end:
                self._why = _too_late(deadline or 0.0)
            elif not self._lives(end):
                stop = "`biollm serve stop` ends this user's own. "
                self._why = errors.CompletionError("The gateway no longer answers.", hint=f"{stop}{_OFF}")
            if self._why:
                return self.close()
        return None

    def _lives(self, end: float) -> bool:
        """Return whether the gateway answers anything at all on a connection of its own."""
        with suppress(OSError, HTTPException), closing(self._dial_again()) as connection:
            connection.timeout = max(0.1, min(_PATIENCE, end - time.monotonic()))
            if connection.sock:
                connection.sock.settimeout(connection.timeout)
            connection.request("GET", "/health")
            return bool(connection.getresponse().status)
        return time.monotonic() >= end  # the deadline is the reason then

    def _dial(self) -> None:
        deadline = self._asked["biollm"].get("deadline") or math.inf
        self._connection.timeout = min(_PATIENCE, deadline)
        try:
            self._connection.connect()
        except OSError as error:
            if isinstance(error, TimeoutError) and deadline <= _PATIENCE:
                raise _too_late(deadline) from None
            where = f"{self._connection.host}:{self._connection.port}"
            raise errors.UnavailableError(f"The gateway at {where} does not answer: {error}.", hint=_OFF) from None
        self._socket = self._connection.sock
        self._socket.settimeout(None)
        if self._left:
            raise ConnectionAbortedError("left")

    def _completion(self, whole: Json, text: str) -> Completion:
        used, choice = part(whole, "usage"), whole["choices"][0]
        details: Json = part(used, "prompt_tokens_details") | part(used, "completion_tokens_details")
        ours = {
            "text": text,
            "usage": known(Usage, used | details),
            "attempts": tuple(known(Attempt, each) for each in whole["biollm"]["attempts"]),
            "parsed": json.loads(text) if "response_format" in self._asked else None,
            "tool_calls": tuple(tool_calls(choice)),
            "finish_reason": choice["finish_reason"],
            "reasoning": part(choice, "message").get("reasoning_content") or "",
            "notes": tuple(whole["biollm"].get("notes", ())),
            "raw": Fields(whole),
        }
        return known(Completion, whole["biollm"] | ours)


def _too_late(deadline: float) -> errors.DeadlineError:
    return errors.DeadlineError(f"No answer within the deadline of {deadline:g} s.")


def _events(response: HTTPResponse) -> Iterator[Json | None]:
    """Yield the data of each event; None is the last of a whole stream."""
    for line in response:
        if line.startswith(b"data: "):
            yield None if line.strip() == b"data: [DONE]" else json.loads(line[6:])


def _error(error: object, *, status: int = 0, partial: str = "") -> errors.BiollmError:
    """Return the exception that the gateway met; `error` may be anything where BIOLLM_GATEWAY names another server."""
    if status == 401:
        return errors.UnavailableError(
            "The gateway refuses the key.", hint="Set BIOLLM_GATEWAY_KEY to one of its keys."
        )
    given = cast("Json", error) if isinstance(error, dict) else {}
    ours: Json = given.get("biollm") or {}
    if not (message := ours.get("message") or given.get("message")):
        url = named()
        message = f"The gateway at {url} answered HTTP {status}." if url else f"The gateway answered HTTP {status}."
        ours = {"hint": f"{'BIOLLM_GATEWAY must be the URL of a biollm gateway. ' if url else ''}{_OFF}"}
    return errors.BiollmError.from_json({**ours, "message": message}, partial=partial)
