"""The command `top`: the picture of now, live in a terminal, once in a pipe, or as a web page in a file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from biollm.monitoring.snapshot import Snapshot

_ENTER, _LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"  # the other screen, without a cursor; and back


def top(
    once: Annotated[bool, typer.Option("--once", help="Print once; so it is in a pipe.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a web page instead.")] = None,
    interval: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between two looks.")] = 2.0,
) -> None:
    """Show who answers, quotas, jobs and the last half hour, live.

    `q` quits. Sends nothing.
    """
    from functools import partial

    from biollm.config import load_config
    from biollm.monitoring.alerts import firing
    from biollm.monitoring.dashboard import render
    from biollm.monitoring.snapshot import Collector

    config = load_config()
    view = Collector.of_process(config, partial(firing, config))
    if html:
        from biollm._files import write_for_user
        from biollm.monitoring import page

        write_for_user(html, page.html(view.snapshot()))
    elif once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        _legible()
        print(render(view.snapshot(), shutil.get_terminal_size((200, 24)).columns))
    else:
        _legible()
        _live(view.snapshot, interval)


def _legible() -> None:
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore # a terminal without UTF-8 shows "?" for a bar


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _live(take: Callable[[], Snapshot], interval: float) -> None:
    """Draw until `q`, Ctrl-C or a signal to end; leave the terminal as it was."""
    import select
    import signal
    import termios
    import tty

    from biollm.monitoring.dashboard import render

    color, keys = "NO_COLOR" not in os.environ, sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    signal.signal(signal.SIGTERM, _end)
    try:
        tty.setcbreak(keys)
        sys.stdout.write(_ENTER)
        while True:
            width, height = shutil.get_terminal_size()
            text = render(take(), width, height, color=color).replace("\n", "\033[K\n")
            sys.stdout.write(f"\033[H{text}\033[K\033[J")
            sys.stdout.flush()
            if select.select([keys], [], [], interval)[0] and os.read(keys, 64)[:1] in (b"q", b"Q", b""):
                return
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
