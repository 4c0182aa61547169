"""The page is one small file that nothing in the ledger can turn against its reader."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from picture import group

from biollm.monitoring import page
from biollm.monitoring.snapshot import CandidateView, Snapshot

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'__POLICY__\\1\u2028"


@pytest.fixture
def taken(waterfall: Callable[..., Path], tmp_path: Path) -> Snapshot:
    return group(waterfall, tmp_path).snapshot()


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_nothing_comes_from_elsewhere(taken: Snapshot) -> None:
    text = page.html(taken)
    links = {name: value for _, attrs in Tags(text).seen for name, value in attrs.items() if name in ("src", "href")}
    assert links == {"href": "data:,"}
    assert "url(" not in text
    assert "@import" not in text
    assert len(text.encode()) < 200_000


def test_its_policy_admits_its_own_script_and_style_alone(taken: Snapshot) -> None:
    text = page.html(taken)
    policy = next(a["content"] for tag, a in Tags(text).seen if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy


def test_no_word_of_a_provider_becomes_markup(taken: Snapshot) -> None:
    evil = replace(
        taken, candidates=(CandidateView(1, EVIL, "refused", EVIL, (), None, None),), alerts=(EVIL,), jobs=(replace(taken.jobs[0], reason=EVIL),)
    )  # fmt: skip
    text = page.html(evil)
    assert [tag for tag, _ in Tags(text).seen] == [tag for tag, _ in Tags(page.html(taken)).seen]
    data = re.search(r'id="snapshot">(.*?)</script>', text, re.DOTALL)
    assert data
    assert not set("<>&") & set(data[1])
    assert json.loads(data[1])["rungs"][0]["why"] == EVIL


def test_events_are_snapshots_one_after_the_other(taken: Snapshot) -> None:
    async def two() -> list[str]:
        stream = page.events(lambda: replace(taken, alerts=("two\nlines",)), interval=0)
        got = [await anext(stream) for _ in range(3)]
        await stream.aclose()
        return got

    retry, *data = asyncio.run(two())
    assert retry == "retry: 2000\n\n"
    for event in data:
        assert event.startswith("data: ")
        assert event.endswith("\n\n")
        assert event.count("\n") == 2
        assert json.loads(event[6:])["alerts"] == ["two\nlines"]
