"""What is private in a log is replaced consistently, and put back into the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from biollm.inputs.redact import Redaction, Restorer


def hide(text: str, *names: str) -> tuple[str, Redaction]:
    redaction = Redaction(names)
    return redaction.hidden([{"role": "user", "content": text}])[0]["content"], redaction


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("ls /home/ann/run: ann@lab.example.org", "ls <home-1>/run: <email-1>"),
        ("/home/ann/a /home/bob/b: bob owns it", "<home-1>/a <home-2>/b: <user-1> owns it"),
        ("/home/shared/ref and /home/data/x", "/home/shared/ref and /home/data/x"),
        ("user=carla wrote; carla left, carlation not", "user=<user-1> wrote; <user-1> left, carlation not"),
        ("export OPENAI_API_KEY=sk-proj-abcdefghijklmnop1234", "export OPENAI_API_KEY=<key-1>"),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer <key-1>"),
        ("https://ann:hunter2@host/x", "https://<password-1>@host/x"),
        ("password: correcthorse", "password: <key-1>"),
        ("AKIAABCDEFGHIJKLMNOP and ghp_" + "a1" * 18, "<key-1> and <key-2>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "<key-1>"),
        ("tower.accessToken = 'eyJ0aWQi12345'", "tower.accessToken = '<key-1>'"),
        ('{"api_key": "jsonkey-0123456789abcdef"}', '{"api_key": "<key-1>"}'),
        ("mysql --password clipassw0rd -u x", "mysql --password <password-1> -u x"),
        ("machine h login netrcuser password netrcpass", "machine h login <user-1> password <password-1>"),
        ("UserId=jdoe(1000) userName: nfuser", "UserId=<user-2>(1000) userName: <user-1>"),
        ("/scratch/users/jdoe/run", "<home-1>/run"),
        ("SyntaxError: unexpected token: identifier", "SyntaxError: unexpected token: identifier"),
        (
            "Process STAR (7e/1b09c4) exit: 137; d41d8cd98f00b204",
            "Process STAR (7e/1b09c4) exit: 137; d41d8cd98f00b204",
        ),
        (
            "-rw-r--r--+ 1 ann lab 12 Nov 24 10:15 a.bam\ndrwxr-s--- 2 root lab 4 Nov 24 b: ann",
            "-rw-r--r--+ 1 <user-1> lab 12 Nov 24 10:15 a.bam\ndrwxr-s--- 2 root lab 4 Nov 24 b: <user-1>",
        ),
        (
            "JobID             User      State \n------------ --------- ---------- \n42                 ann     FAILED \n42.batch                 FAILED ",
            "JobID             User      State \n------------ --------- ---------- \n42                 <user-1>     FAILED \n42.batch                 FAILED ",
        ),
        ("JobID|User|State\n42|ann|FAILED\n42.0||FAILED", "JobID|User|State\n42|<user-1>|FAILED\n42.0||FAILED"),
        (
            "JOBID PARTITION NAME     USER ST\n   42       gpu star      ann  R\n\nnext fine",
            "JOBID PARTITION NAME     USER ST\n   42       gpu star      <user-1>  R\n\nnext fine",
        ),
        ("USER  PID %CPU COMMAND\nann     7  0.0 STAR", "USER  PID %CPU COMMAND\n<user-1>     7  0.0 STAR"),
        ("The User Guide\nsays nothing; USER\nset", "The User Guide\nsays nothing; USER\nset"),
        ("<user-1> of /home/ann and ann", "<user-1> of <home-1> and <user-2>"),
    ],
)
def test_what_is_private_is_replaced(text: str, hidden: str) -> None:
    found, redaction = hide(text)
    assert found == hidden
    assert redaction.restore(found) == text


def test_names_of_the_caller_are_replaced_as_words() -> None:
    found, redaction = hide("WT_REP1 and WT_REP10: WT_REP1.bam", "WT_REP1")
    assert found == "<name-1> and WT_REP10: <name-1>.bam"
    assert redaction.note() == "redacted: 1 name"


def test_messages_share_the_placeholders_and_keep_what_is_no_text() -> None:
    redaction, image = Redaction(), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    call = {"id": "1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "/home/ann"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "/home/ann"}, image]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ann"},
    ]
    user, assistant, tool = redaction.hidden(messages)
    assert user["content"] == [{"type": "text", "text": "<home-1>"}, image]
    assert assistant["tool_calls"][0]["function"] == {"name": "ls", "arguments": '{"path": "<home-1>"}'}
    assert tool["content"] == "<user-1>"
    assert messages[0]["content"][0]["text"] == "/home/ann"
    assert redaction.note() == "redacted: 1 home folder, 1 user name"


def test_json_in_an_answer_stays_json() -> None:
    found, redaction = hide('the sample "A" \\ B', '"A" \\ B')
    assert found == "the sample <name-1>"
    assert json.loads(redaction.restore('{"sample": "<name-1>"}')) == {"sample": '"A" \\ B'}
    assert redaction.restored({"a": ["<name-1>", 1, None]}) == {"a": ['"A" \\ B', 1, None]}


@pytest.mark.parametrize("size", range(1, 12))
def test_a_stream_may_cut_a_placeholder_anywhere(size: int) -> None:
    _, redaction = hide("/home/ann")
    restorer, text = Restorer(redaction), "see <home-1>/x, a < b, <home-9> and <home-1"
    pieces = [restorer.feed(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join([*pieces, restorer.end()]) == "see /home/ann/x, a < b, <home-9> and <home-1"
