"""An alert is told once when it begins and once when it ends, to everybody who shall hear of it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, until
from provider import Loopback

from biollm._runtime import ledger
from biollm.config import Alerts, load_config
from biollm.errors import ConfigError
from biollm.ledger import Record
from biollm.monitoring import alerts
from biollm.monitoring.rules import down_since, holding
from biollm.monitoring.snapshot import CandidateView, Collector, JobView, Snapshot
from biollm.monitoring.usage import Quota, Report, Row

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]
NOW = 1_000_000.0
NOTHING = Snapshot(NOW, (), (), ())
ROW = Row(name="total", requests=20, error_rate=0.25, fallback_rate=0.5, p95_ms=31_000)
BUDGET = Quota(
    scope="openai/default",
    limit="10 USD/month",
    unit="usd",
    amount=10,
    used=8.1,
    left=1.9,
    resets_at=None,
    exhausted_at=None,
)
TOKENS = Quota(
    scope="lightning/default",
    limit="30M tokens/month",
    unit="tokens",
    amount=30e6,
    used=29e6,
    left=1e6,
    resets_at=None,
    exhausted_at=None,
)
FREQUENT = Quota(
    scope="lightning/default",
    limit="120k tokens/min",
    unit="tokens",
    amount=120e3,
    used=119e3,
    left=1e3,
    resets_at=None,
    exhausted_at=None,
)
USED = Report(
    since=NOW - 900, until=NOW, by="provider", exact=True, rows=(), total=ROW, quotas=(BUDGET, TOKENS, FREQUENT)
)


def candidate(state: Any, last: float | None = None) -> CandidateView:
    return CandidateView(1, "gemini/flash", state, "HTTP 503", (), None, last)


def job(phase: str, left: float, number: str = "4711") -> JobView:
    return JobView(number, "qwen", phase, "out of memory", "gpu01", left)


def seen(*, candidates: tuple[CandidateView, ...] = (), jobs: tuple[JobView, ...] = ()) -> Snapshot:
    return replace(NOTHING, candidates=candidates, jobs=jobs)


@pytest.mark.parametrize(
    ("rules", "snapshot", "texts"),
    [
        ({"error_rate": 0.2}, NOTHING, ["25% of 20 requests got no answer in the last 15 min"]),
        ({"error_rate": "25%"}, NOTHING, []),
        ({"error_rate": 0.2, "at_least": 21}, NOTHING, []),
        (
            {"fallback_rate": "1/4", "window": "3 h"},
            NOTHING,
            ["50% of 20 requests fell back to a later deployment in the last 3.0 h"],
        ),
        ({"p95": "30 s"}, NOTHING, ["5% of 20 requests took over 31.0 s in the last 15 min"]),
        ({"p95": "32 s"}, NOTHING, []),
        ({"budget_share": "97%"}, NOTHING, []),
        (
            {"budget_share": "4/5"},
            NOTHING,
            ["openai/default has used 81% of 10 USD/month", "lightning/default has used 97% of 30M tokens/month"],
        ),
        ({"job_failed": True}, seen(jobs=(replace(job("failed", 0), reason="CANCELLED by 1000"),)), []),
        (
            {"expires": "30 min"},
            seen(jobs=(job("ready", 900), replace(job("ready", 9000, "4712"), models="qwen, llama"))),
            [],
        ),
        (
            {"expires": "30 min"},
            seen(jobs=(replace(job("ready", 900), models="qwen, llama"), job("ready", 9000, "4712"))),
            ["the server of qwen, llama (job 4711) ends in 15 min"],
        ),
        (
            {"down": "10 min"},
            seen(candidates=(candidate("failing"),)),
            ["gemini/flash has not answered for 20 min: HTTP 503"],
        ),
        ({"down": "30 min"}, seen(candidates=(candidate("failing"),)), []),
        ({"down": "10 min"}, seen(candidates=(candidate("failing", 60.0),)), []),
        ({"down": "10 min"}, seen(candidates=(candidate("limited"),)), []),
        ({"job_failed": True}, seen(jobs=(job("failed", 0),)), ["job 4711 (qwen) failed: out of memory"]),
        ({"expires": "30 min"}, seen(jobs=(job("ready", 900),)), ["the server of qwen (job 4711) ends in 15 min"]),
        ({"expires": "30 min"}, seen(jobs=(job("ready", 900), job("ready", 9000, "4712"))), []),
        ({"expires": "30 min"}, seen(jobs=(job("ready", 3600),)), []),
        ({}, seen(candidates=(candidate("failing"),), jobs=(job("failed", 0),)), []),
    ],
)
def test_a_rule_holds_when_it_should(rules: Any, snapshot: Snapshot, texts: list[str]) -> None:
    down = down_since({"gemini/flash": NOW - 1200}, snapshot)
    assert [str(each) for each in holding(Alerts(**rules), USED, snapshot, down)] == texts


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"error_rat": 0.1}, "error_rate"),
        ({"error_rate": 7}, "alerts.error_rate"),
        ({"window": "soon"}, "is not a valid time span"),
        ({"command": "mail me"}, "must be a list"),
        ({"webhook_env": "https://hooks.slack.com/services/T0/B0/x"}, "not the name of an environment variable"),
    ],
)
def test_what_makes_no_sense_is_told(waterfall: Waterfall, net: Loopback, written: Any, told: str) -> None:
    folder = waterfall({"alerts": written}, first=net.serve())
    with pytest.raises(ConfigError, match=told) as caught:
        load_config()
    assert f"{folder}/providers.yaml:" in str(caught.value)


class Hook(BaseHTTPRequestHandler):
    """A chat's webhook; `how` is the status, or None for one that hangs."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        if server.how is None:
            server.go.wait(30)
        else:
            server.heard.append(json.loads(body)["text"])
        self.send_response(server.how or 200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.daemon_threads, server.how, server.heard, server.go = True, 200, [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CHAT_URL", f"http://127.0.0.1:{server.server_port}/services/planted-secret")
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def sent(outcome: Any, count: int = 10) -> None:
    """Write `count` requests that ended so."""
    for number in range(count):
        ledger().finish(None, "", Record(time.time(), f"{outcome}{number}", "first/small", "first", "default", "small",
                                         outcome, "HTTP 500" if outcome == "failed" else "", ms=100.0, order=1))  # fmt: skip
    ledger().flush()


def look(state: Path, said: list[str], **more: Any) -> list[str]:
    config = load_config()
    shot = Collector.of_process(config).snapshot()
    return [each.rule for each in alerts.check(config, ledger(), shot, state, said.append, **more)]


def test_everybody_is_told_once_of_the_beginning_and_once_of_the_end(
    net: Loopback, waterfall: Waterfall, state: Path, hook: Any, tmp_path: Path
) -> None:
    heard, said = tmp_path / "heard", list[str]()
    keep = f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read() + chr(10))"
    rules = {"error_rate": 0.4, "webhook_env": "CHAT_URL", "command": [sys.executable, "-c", keep]}
    waterfall({"alerts": rules}, first=net.serve())
    assert (look(state, said), said) == ([], [])
    sent("failed")
    assert [look(state, said) for _ in range(3)] == [["error_rate"]] * 3
    text = "100% of 10 requests got no answer in the last 15 min"
    config = load_config()
    assert Collector.of_process(config, partial(alerts.firing, config)).snapshot().alerts == (text,)
    sent("ok", 90)
    assert [look(state, said) for _ in range(3)] == [[]] * 3
    assert said == [f"ALERT  {text}", f"ALERT  resolved: {text}"]
    assert [each.partition(": ")[2] for each in hook.heard] == [text, f"resolved: {text}"]
    told = [json.loads(line)[0] for line in heard.read_text().splitlines()]
    assert [(each["rule"], each["resolved"]) for each in told] == [("error_rate", False), ("error_rate", True)]
    assert oct((state / "alerts.json").stat().st_mode & 0o777) == "0o600"
    assert "planted" not in (state / "alerts.json").read_text()


def test_what_a_newer_version_has_told_is_not_told_again(net: Loopback, waterfall: Waterfall, state: Path) -> None:
    said = list[str]()
    waterfall({"alerts": {"error_rate": 0.4}}, first=net.serve())
    sent("failed")
    look(state, said)
    kept = json.loads((state / "alerts.json").read_text())
    newer = {**kept, "more": 1, "alerts": [{**each, "severity": "high"} for each in kept["alerts"]]}
    (state / "alerts.json").write_text(json.dumps(newer))
    assert look(state, said) == ["error_rate"] and len(said) == 1


@pytest.mark.slow
def test_a_command_that_hangs_is_ended_and_sees_no_key(
    net: Loopback, waterfall: Waterfall, state: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    keep = f"import os, time; open({str(seen)!r}, 'w').write(str(os.environ)); time.sleep(60)"
    waterfall({"alerts": {"error_rate": 0.4, "command": [sys.executable, "-c", keep]}}, first=net.serve())
    sent("failed")
    said: list[str] = []
    assert look(state, said, patience=3) == ["error_rate"]
    assert said[1].endswith("did not exit within 3 s. It will be retried at the next check.")
    assert "PATH" in seen.read_text()
    assert "planted" not in seen.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "why"), [(500, "HTTP 500"), (None, "TimeoutError")])
def test_a_target_that_fails_is_told_later_and_holds_up_nobody(
    net: Loopback, waterfall: Waterfall, state: Path, hook: Any, how: int | None, why: str
) -> None:
    waterfall({"alerts": {"error_rate": 0.4, "webhook_env": "CHAT_URL"}}, first=net.serve())
    sent("failed")
    hook.how, said = how, list[str]()
    assert look(state, said, patience=10 if how else 0.5) == ["error_rate"]
    assert said[0].startswith("ALERT  100% of 10")
    assert said[1:] == [f"Alert delivery to the webhook failed: {why}. It will be retried at the next check."]
    hook.how, hook.heard[:] = 200, []
    assert look(state, said) == look(state, said) == ["error_rate"]
    assert (len(hook.heard), len(said)) == (1, 2)


def test_who_was_not_told_that_it_began_is_not_told_that_it_ended(
    net: Loopback, waterfall: Waterfall, state: Path, hook: Any
) -> None:
    waterfall({"alerts": {"error_rate": 0.4, "webhook_env": "CHAT_URL"}}, first=net.serve())
    sent("failed")
    hook.how, said = 503, list[str]()
    look(state, said)
    hook.how, hook.heard[:] = 200, []
    sent("ok", 90)
    assert look(state, said) == []
    assert hook.heard == []
    assert said[-1].startswith("ALERT  resolved: ")


def test_who_looks_at_the_same_time_tells_once(net: Loopback, waterfall: Waterfall, state: Path, hook: Any) -> None:
    waterfall({"alerts": {"error_rate": 0.4, "webhook_env": "CHAT_URL"}}, first=net.serve())
    sent("failed")
    said: list[str] = []
    running = [threading.Thread(target=look, args=(state, said)) for _ in range(6)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert (len(hook.heard), len(said)) == (1, 1)


def test_a_rule_that_is_taken_out_ends_in_silence(net: Loopback, waterfall: Waterfall, state: Path) -> None:
    said: list[str] = []
    waterfall({"alerts": {"error_rate": 0.4}}, first=net.serve())
    sent("failed")
    look(state, said)
    waterfall(first=net.serve())
    assert (look(state, said), len(said)) == ([], 1)


def test_a_failed_job_is_news_once(state: Path, net: Loopback, waterfall: Waterfall) -> None:
    waterfall({"alerts": {"job_failed": True}}, first=net.serve())
    config, said = load_config(), list[str]()

    def after(seconds: float, *jobs: JobView) -> int:
        shot = replace(seen(jobs=jobs), at=NOW + seconds)
        return len(alerts.check(config, ledger(), shot, state, said.append))

    failed = job("failed", 0)
    # Slurm may be too slow to tell of its jobs once
    assert [after(0, failed), after(60, failed), after(120), after(180, failed), after(1000, failed)] == [1, 1, 1, 1, 0]
    assert said == ["ALERT  job 4711 (qwen) failed: out of memory"]


@pytest.mark.parametrize(
    ("rules", "alert"),
    [({"down": 0}, "gemini/flash has not answered for 0 min: HTTP 503"), ({"p95": 0}, "5% of 10 requests took over")],
)
def test_a_bound_of_nothing_is_a_rule_like_any_other(
    state: Path, net: Loopback, waterfall: Waterfall, rules: Any, alert: str
) -> None:
    waterfall({"alerts": rules}, first=net.serve())
    sent("ok")
    config, said, shot = load_config(), list[str](), seen(candidates=(candidate("failing"),))
    for later in range(3):
        found = alerts.check(config, ledger(), replace(shot, at=NOW + later), state, said.append)
        assert [each.rule for each in found] == [*rules]
    assert [line.startswith(f"ALERT  {alert}") for line in said] == [True]


def test_an_older_look_undoes_nothing(state: Path, net: Loopback, waterfall: Waterfall) -> None:
    waterfall({"alerts": {"expires": "30 min"}}, first=net.serve())
    config, said = load_config(), list[str]()
    older, newer = seen(), replace(seen(jobs=(job("ready", 900),)), at=NOW + 5)
    for shot in (newer, older, newer):
        found = alerts.check(config, ledger(), shot, state, said.append)
        assert [each.rule for each in found] == ["expires"]
    assert len(said) == 1


def test_what_a_log_was_told_a_cron_still_mails(net: Loopback, waterfall: Waterfall, state: Path) -> None:
    waterfall({"alerts": {"error_rate": 0.4}}, first=net.serve())
    sent("failed")
    told: list[int] = []
    for log in (True, True, False, False):
        said: list[str] = []
        look(state, said, log=log)
        told.append(len(said))
    assert told == [1, 0, 1, 0]


def test_the_command_is_made_for_cron(net: Loopback, waterfall: Waterfall, state: Path, biollm: Biollm) -> None:
    waterfall(first=net.serve())
    assert "No alert rules" in biollm("alerts").out
    waterfall({"alerts": {"error_rate": "40%"}}, first=net.serve())
    assert biollm("alerts") == (0, "No active alerts.\n", "")
    sent("failed")
    first, again = biollm("alerts", "--quiet"), biollm("alerts", "--quiet")
    assert (first.code, first.out) == (1, "")
    assert first.err.startswith("ALERT  100% of 10 requests got no answer")
    assert again == (1, "", "")
    (told,) = biollm("alerts", "--json").json
    assert (told["rule"], told["since"][:2], told["since"][-6:]) == ("error_rate", "20", "+00:00")
    assert biollm("alerts").out.startswith("since 20")


def test_a_webhook_without_its_url_or_with_one_that_others_can_read(
    net: Loopback, waterfall: Waterfall, state: Path, tmp_path: Path, biollm: Biollm
) -> None:
    sent("failed")
    waterfall({"alerts": {"error_rate": 0.4, "webhook_env": "NOT_THERE"}}, first=net.serve())
    assert "NOT_THERE is not set" in biollm("alerts").err
    checked = biollm("config", "--check")
    assert "alerts.webhook_env: cannot be used: NOT_THERE is not set." in checked.out + checked.err
    (tmp_path / "url").write_text("http://127.0.0.1:1/planted")
    (tmp_path / "url").chmod(0o644)
    waterfall({"alerts": {"error_rate": 0.4, "webhook_file": str(tmp_path / "url")}}, first=net.serve())
    ran = biollm("alerts")
    assert "chmod 600" in ran.err
    (tmp_path / "url").chmod(0o600)
    ran = biollm("alerts")
    assert "webhook failed: URLError" in ran.err
    assert "planted" not in ran.err


@pytest.mark.slow
def test_the_gateway_looks_too(net: Loopback, waterfall: Waterfall, state: Path, gateway: Callable[..., Any]) -> None:
    waterfall({"alerts": {"error_rate": 0.4}}, first=net.serve())
    sent("failed")
    gateway()
    until(lambda: "ALERT  100% of 10 requests" in (state / "gateway.log").read_text(), 60)
