"""What the progress of a phase shows, on a terminal and in a log."""

import io
import logging
import re
import time

import pytest
from rich.console import Console

from pipeline.cluster.progress import PhaseProgress


def test_a_bar_shows_count_rate_and_time_left() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    progress = PhaseProgress(console)
    with progress.phase("values", 40, kept=10) as ticker:
        for _ in range(3):
            time.sleep(0.06)
            ticker.advance(10)
    last = [line for line in re.split(r"[\r\n]", shown.getvalue()) if "values" in line][-1]
    assert "40/40" in last and "(10 kept)" in last and "left" in last
    (rate,) = re.findall(r"([\d,.]+)/s", last)
    assert 0 < float(rate.replace(",", "")) < 10 / 0.06 * 1.5
    assert progress.seconds["values"] >= 0.18


def test_a_log_gets_the_same_as_a_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = PhaseProgress(Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO), progress.phase("values", 3, kept=1) as ticker:
        time.sleep(0.05)
        ticker.advance(2)
    first, last = caplog.messages
    assert first == "values: 1 of 3 kept from before"
    found = re.fullmatch(r"values: 3 of 3, ([\d.]+) a second, 0 s left", last)
    assert found is not None and 0 < float(found[1]) <= 2 / 0.05


def test_nothing_is_shown_without_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PhaseProgress()
    with progress.phase("values", 1) as ticker:
        ticker.advance(1)
    assert capsys.readouterr() == ("", "") and progress.seconds["values"] > 0
