from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from toolkit import config
from toolkit.errors import FormatError, UsageError


@dataclass(frozen=True)
class Pool:
    size: int = 4


@dataclass(frozen=True)
class Server:
    host: str
    port: int = 8000
    mode: Literal["fast", "careful"] = "fast"
    pool: Pool = field(default_factory=Pool)
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.port > 65535:
            raise ValueError(f"port {self.port} is past 65535")


def test_values_become_the_dataclass_itself():
    made = config.parse(
        Server, {"host": "h", "pool": {"size": 2}, "names": ["a"]}, where="server.toml"
    )
    assert made == Server("h", pool=Pool(2), names=("a",))
    assert type(made) is Server


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host": "h", "prot": 1}, r"unknown key in server.toml 'prot'; did you mean 'port'"),
        ({"host": "h", "pool": {"sise": 1}}, r"server.toml: pool.sise: .*got 1"),
        ({"host": "h", "port": "many"}, r"server.toml: port: .*got 'many'"),
        ({"host": "h", "port": 1.5}, r"server.toml: port: "),
        ({"host": "h", "mode": "reckless"}, r"server.toml: mode: .*'fast' or 'careful'"),
        ({"host": "h", "port": 70000}, r"past 65535"),
        ({}, r"server.toml: host: Field required"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_file(values, message):
    with pytest.raises(UsageError, match=message):
        config.parse(Server, values, where="server.toml")


def test_a_file_is_read_and_its_faults_name_it(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text('host = "h"\n[pool]\nsize = 3\n')
    assert config.load(Server, path) == Server("h", pool=Pool(3))
    path.write_text("host = ")
    with pytest.raises(FormatError, match=r"server.toml is not valid TOML: Invalid value"):
        config.load(Server, path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not valid TOML"):
        config.load(Server, path)


def test_missing_files_and_folders_are_usage_errors(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            config.load(Server, path)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "mine"))
    assert config.cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("TOOLKIT_CACHE", "~/mine")
    assert config.cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("TOOLKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == tmp_path / "xdg" / "toolkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert config.cache_dir() == Path.home() / ".cache" / "toolkit"


def test_a_path_through_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        config.read_toml(tmp_path / "file" / "server.toml")
