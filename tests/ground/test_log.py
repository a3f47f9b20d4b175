import json
import logging

import pytest

from toolkit import log


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger("toolkit")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def test_warnings_are_shown_and_the_rest_only_when_asked_for(capsys):
    log.setup()
    log.get_logger("toolkit.plan").info("hidden")
    log.get_logger("toolkit.plan").warning("shown")
    log.setup(verbose=True)
    log.get_logger("toolkit.plan").debug("now shown")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "WARNING toolkit.plan: shown\nDEBUG toolkit.plan: now shown\n"


def test_setting_up_twice_writes_once(capsys):
    log.setup()
    log.setup()
    log.get_logger("toolkit").warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_json_is_one_object_a_line_with_the_exception(capsys, monkeypatch):
    monkeypatch.setenv("TOOLKIT_LOG", "JSON")
    log.setup()
    try:
        raise RuntimeError('a "quoted"\nproblem')
    except RuntimeError:
        log.get_logger("toolkit.serve").exception("failed %d times", 3)
    (line,) = capsys.readouterr().err.splitlines()
    written = json.loads(line)
    assert written["level"] == "error"
    assert written["logger"] == "toolkit.serve"
    assert written["message"] == "failed 3 times"
    assert "RuntimeError" in written["exception"]
    assert written["time"].startswith("2")


def test_an_event_has_fields(capsys, monkeypatch):
    logger = log.get_logger("toolkit.serve")
    log.setup(verbose=True, as_json=False)
    log.event(logger, "request", status=200, id=None, total_ms=1.5)
    assert capsys.readouterr().err == "INFO toolkit.serve: request status=200 total_ms=1.5\n"
    log.setup(verbose=True, as_json=True)
    log.event(logger, "request", status=200, id=None, total_ms=1.5)
    written = json.loads(capsys.readouterr().err)
    told = {"message": "request", "status": 200, "id": None, "total_ms": 1.5}
    assert told.items() <= written.items()


def test_other_libraries_keep_their_own_logging(capsys):
    log.setup(verbose=True)
    assert logging.getLogger().handlers != logging.getLogger("toolkit").handlers
    assert not logging.getLogger("toolkit").propagate
