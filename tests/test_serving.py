"""The lines of the log."""

from __future__ import annotations

import logging

from gateway.serving import TextLines

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S%z"


def line_at(second: float) -> logging.LogRecord:
    line = logging.LogRecord("gateway", logging.INFO, __file__, 0, "%s", ("words",), None)
    line.created = second
    return line


def test_every_line_has_the_time_of_its_own_second() -> None:
    lines, plain = TextLines(FORMAT, TIME), logging.Formatter(FORMAT, TIME)
    for second in (0.0, 0.9, 1.0, 1.1, 0.5, 1_700_000_000.0, 1_700_000_000.999, 1_720_000_000.0):
        assert lines.format(line_at(second)) == plain.format(line_at(second))
