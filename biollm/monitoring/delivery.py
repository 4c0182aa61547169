"""Sends alerts to stderr, a webhook and a command. Errors name no secret, such as the webhook's URL."""

from __future__ import annotations

import html
import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biollm._ownership import is_private
from biollm.errors import Problem

if TYPE_CHECKING:
    from biollm.config import Alerts, Config
    from biollm.monitoring.rules import Alert

PATIENCE = 10.0  # seconds for a target

Target = Callable[[Sequence["Alert"]], object]


class _DeliveryError(Exception):
    """Why a target was not reached, without a secret."""


def targets(config: Config, say: Callable[[str], None], patience: float) -> dict[str, Target]:
    """Return the targets of the configuration by name; stderr first, since it cannot hang."""
    rules, found = config.alerts, dict[str, Target]()
    if rules.stderr:
        found["stderr"] = lambda alerts: [say(f"ALERT  {alert}") for alert in alerts]
    if rules.webhook_env or rules.webhook_file:
        found["webhook"] = partial(_post, rules, patience)
    if rules.command:
        secrets = {account.env_key for provider in config.providers for account in provider.accounts}
        found["command"] = partial(_run, rules.command, {*secrets, rules.webhook_env}, patience)
    return found


def deliver(targets: Mapping[str, Target], alerts: Sequence[Alert], say: Callable[[str], None]) -> None:
    """Send each target what is pending there; it stays pending if that fails."""
    for name, target in targets.items():
        if not (pending := [alert for alert in alerts if name in alert.pending]):
            continue
        try:
            target(pending)
        except Exception as error:  # its text may hold the webhook's URL
            why = str(error) if isinstance(error, _DeliveryError) else type(error).__name__
            say(f"Alert delivery to the {name} failed: {why}. It will be retried at the next check.")
            continue
        for alert in pending:
            alert.pending.remove(name)


def _post(rules: Alerts, patience: float, alerts: Sequence[Alert]) -> None:
    """Post what Slack and compatible services take. Not with httpx, whose log names the URL."""
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class NoRedirect(HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
            """Follow nothing: the POST would become a GET, and count as delivered."""

    user = f"biollm of {Path.home().name}@{socket.gethostname()}"
    text = html.escape("\n".join(f"{user}: {alert}" for alert in alerts), quote=False)  # Slack would obey <!channel>
    headers = {"Content-Type": "application/json"}
    request = Request(_url(rules), json.dumps({"text": text}).encode(), headers)  # noqa: S310 # _url admits http(s) alone
    try:
        build_opener(NoRedirect).open(request, timeout=patience).close()
    except HTTPError as error:
        raise _DeliveryError(f"HTTP {error.code}") from None


def unready(config: Config) -> Iterator[Problem]:
    """Yield why the webhook's URL cannot be read, with file and line."""
    rules = config.alerts
    if key := "webhook_env" if rules.webhook_env else "webhook_file" if rules.webhook_file else None:
        try:
            _url(rules)
        except (_DeliveryError, OSError) as error:
            yield config.problem(f"alerts.{key}", f"cannot be used: {error}.")


def _url(rules: Alerts) -> str:
    url, where = os.environ.get(rules.webhook_env or "", ""), rules.webhook_env
    if not url and (file := rules.webhook_file):
        if not file.exists():
            raise _DeliveryError(f"{file} does not exist")
        if not is_private(file, stat.S_ISREG):
            raise _DeliveryError(f"{file} must be a file that only you can read (chmod 600)")
        url, where = file.read_text().strip(), str(file)
    if not url.startswith(("https://", "http://")):
        raise _DeliveryError(f"{where} does not hold a URL" if url else f"{where} is not set")
    return url


def _run(command: Sequence[str], secrets: set[str | None], patience: float, alerts: Sequence[Alert]) -> None:
    """Run the command with JSON on its stdin, and without keys in its environment."""
    text = json.dumps([{**each.facts, "resolved": each.over} for each in alerts])
    env = {name: value for name, value in os.environ.items() if name not in secrets}
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=quiet, stderr=quiet, text=True, start_new_session=True
        )
    except OSError as error:
        raise _DeliveryError(f"{command[0]}: {error.strerror}") from None
    try:
        child.communicate(text, timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its children, too
        child.wait()
        raise _DeliveryError(f"{command[0]} did not exit within {patience:g} s") from None
    if child.returncode:
        raise _DeliveryError(f"{command[0]} failed with exit code {child.returncode}")
