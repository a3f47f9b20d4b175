import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit import record
from toolkit.errors import FormatError, ToolkitError, UsageError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def in_a_process(code, path):
    """Run `code` with `path` in a process of its own, which may die."""
    program = "import sys, os, signal\nfrom pathlib import Path\npath = Path(sys.argv[1])\n"
    return subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code), str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def old(tmp_path):
    """A file that was written before."""
    path = tmp_path / "result.json"
    path.write_bytes(b"old")
    return path


@given(body=json_values)
@same_folder
def test_what_is_written_is_what_is_read(body, tmp_path):
    path = tmp_path / "a.json"
    mark = record.write(path, kind="plan", version=1, body=body)
    found = record.read(path, kind="plan", version=1)
    assert found["body"] == body
    assert found["digest"] == mark == record.digest(body)


def test_a_record_says_where_it_comes_from(tmp_path):
    record.write(tmp_path / "a.json", kind="plan", version=1, body={})
    made = record.read(tmp_path / "a.json", kind="plan", version=1)["provenance"]
    assert {"created", "command", "commit", "machine", "versions"} == set(made)
    assert {"toolkit", "python", "torch"} <= set(made["versions"])


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_a_digest_does_not_depend_on_the_order_of_keys(body):
    assert record.digest(body) == record.digest(dict(reversed(body.items())))


def test_a_torn_record_is_never_read(tmp_path):
    path = tmp_path / "a.json"
    record.write(path, kind="plan", version=1, body={"steps": [1, 2, 3], "name": "é"})
    whole = path.read_bytes()
    # All but the newline at the end is needed.
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            record.read(path, kind="plan", version=1)


def test_an_edited_record_is_named_instead_of_believed(tmp_path):
    path = tmp_path / "a.json"
    record.write(path, kind="plan", version=1, body={"degree": 2})
    path.write_text(path.read_text().replace('"degree": 2', '"degree": 4'))
    with pytest.raises(FormatError, match=r"does not match its digest.*write it again"):
        record.read(path, kind="plan", version=1)


def test_another_version_or_kind_is_named(tmp_path):
    path = tmp_path / "a.json"
    record.write(path, kind="plan", version=2, body={})
    with pytest.raises(FormatError, match=r"version 2 of the plan format.*reads version 1"):
        record.read(path, kind="plan", version=1)
    with pytest.raises(FormatError, match=r"is not a graph file.*toolkit/plan"):
        record.read(path, kind="graph", version=2)


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "{}", '{"format": 3}', "\x00\xff", "{]"])
def test_a_foreign_file_is_a_format_error(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError):
        record.read(path, kind="plan", version=1)


def test_a_missing_file_and_a_folder_are_usage_errors(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            record.read(path, kind="plan", version=1)


def test_a_number_json_cannot_hold_writes_nothing(old):
    with pytest.raises(ValueError, match="JSON"):
        record.write(old, kind="plan", version=1, body={"loss": float("nan")})
    assert old.read_bytes() == b"old"


def test_a_process_killed_while_writing_leaves_the_old_file(old):
    done = in_a_process(
        """
        from toolkit import record
        with record.atomic(path) as file:
            file.write(b"new" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        old,
    )
    assert done.returncode == -signal.SIGKILL
    assert old.read_bytes() == b"old"


def test_a_process_killed_after_writing_leaves_the_new_file(old):
    done = in_a_process(
        """
        from toolkit import record
        with record.atomic(path) as file:
            file.write(b"new")
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        old,
    )
    assert done.returncode == -signal.SIGKILL
    assert old.read_bytes() == b"new"


def test_a_limit_on_file_size_leaves_the_old_file_and_says_why(old):
    done = in_a_process(
        """
        import resource
        from toolkit import errors, record
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            record.write_bytes(path, b"x" * 100_000)
        except errors.ToolkitError as error:
            print(error)
        """,
        old,
    )
    assert done.stdout == f"cannot write {old}: File too large\n", done.stderr
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("call", ["fsync", "fdopen"])
def test_a_full_disk_leaves_the_old_file_and_no_other(call, old, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ToolkitError, match=r"cannot write .*result.json: No space left on device"):
        record.write_bytes(old, b"new")
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]


def test_an_error_of_the_writer_leaves_the_old_file_and_is_its_own(old):
    def write_half():
        with record.atomic(old) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert old.read_bytes() == b"old"
    assert list(old.parent.iterdir()) == [old]


def test_data_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, happened = tmp_path / "a", []
    fsync, replace = os.fsync, type(path).replace

    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(
        type(path), "replace", lambda self, to: (happened.append("rename"), replace(self, to))[1]
    )
    record.write_bytes(path, b"data")
    assert happened == ["fsync", "rename", "fsync"]


def test_results_are_as_readable_as_other_files(tmp_path):
    record.write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_folders_on_the_way_are_made(tmp_path):
    record.write_bytes(tmp_path / "a" / "b" / "c", b"data")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"data"


def test_writing_over_a_folder_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ToolkitError, match=r"cannot write .*Is a directory"):
        record.write_bytes(tmp_path / "a", b"data")


def test_a_record_is_json_people_can_read(tmp_path):
    record.write(tmp_path / "a.json", kind="plan", version=1, body={"a": 1})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["format"] == "toolkit/plan"
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 5


def test_writing_through_a_file_says_so(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ToolkitError, match="cannot write"):
        record.write_bytes(tmp_path / "a" / "b", b"data")


def test_reading_through_a_file_says_so(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ToolkitError):
        record.read(tmp_path / "a" / "b", kind="plan", version=1)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000], ids=["deep", "long"])
def test_json_too_deep_or_too_long_to_parse_is_a_format_error(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FormatError):
        record.read(tmp_path / "a.json", kind="plan", version=1)
