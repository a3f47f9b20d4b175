import json
import re
import sys
from dataclasses import replace
from importlib import metadata

import pytest
from rich.console import Console
from typer.testing import CliRunner

from toolkit.cli import diagnosis, doctor, inspection
from toolkit.cli.inspection import Extra, Machine, Package, Threads, Torch

runner = CliRunner()

HERE = Machine(
    cpu="a processor",
    architecture="x86_64",
    simd=("avx2",),
    num_cpus=4,
    affinity=(0, 1, 2, 3),
    quota_cores=None,
    usable_cores=4,
    memory_bytes=16 << 30,
    available_bytes=8 << 30,
    memory_limit_bytes=None,
    cache="/cache",
    cache_free_bytes=50 << 30,
    cache_writable=True,
    compiler="g++ 12",
    python="3.11.0",
    executable="/usr/bin/python",
    system="Linux",
)
TORCH = Torch("2.13.0", built_for="CPU only", threads=4, interop_threads=4,
              backends={"gloo": "works", "nccl": "no CUDA device", "fake": "works"})  # fmt: skip
CORE = Extra("", (Package("numpy", ">=1", "2.0", None),), "pip install toolkit")
CALM = Threads(4, 4, {})


def judged(here=HERE, torch=TORCH, packages=(CORE,), running=CALM, driver=False):
    return diagnosis.findings(here, torch, packages, running, driver=driver)


def test_a_machine_in_order_needs_nothing():
    assert judged() == ()


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"running": Threads(4, 32, {})}, "32 threads on 4 usable cores", "OMP_NUM_THREADS=4"),
        (
            {"running": Threads(4, 4, {"OMP_WAIT_POLICY": "active"})},
            "spins on 4 usable cores",
            "PASSIVE",
        ),
        ({"here": replace(HERE, compiler=None)}, r"no C\+\+ compiler", r"g\+\+"),
        ({"here": replace(HERE, simd=())}, "no AVX2", "newer"),
        ({"here": replace(HERE, cache_writable=False)}, "cannot be written", "TOOLKIT_CACHE"),
        ({"here": replace(HERE, cache_free_bytes=1 << 20)}, "1 MiB free", "TOOLKIT_CACHE"),
        ({"here": replace(HERE, memory_limit_bytes=1 << 30)}, "1 GiB of memory", "limit"),
        ({"torch": replace(TORCH, backends={"gloo": "no route"})}, "no route", "GLOO_SOCKET"),
        ({"driver": True}, "built for the CPU only", "CUDA"),
        (
            {"driver": True, "torch": replace(TORCH, built_for="CUDA 13.0")},
            "sees no device",
            "nvidia-smi",
        ),
        ({"packages": ()}, "without being installed", r"install -e \."),
    ],
)
def test_a_warning_names_the_problem_and_the_remedy(changes, problem, remedy):
    (found,) = judged(**changes)
    assert re.search(problem, found.problem)
    assert re.search(remedy, found.remedy)
    assert not found.essential


def test_two_builds_of_one_library_are_named():
    both = [Package(name, ">=1", "1.9", None) for name in ("faiss-cpu", "faiss-gpu-cu12")]
    (found,) = judged(packages=(CORE, Extra("rag", tuple(both), "")))
    assert "overwrite each other" in found.problem


def test_a_missing_core_package_and_a_torch_that_does_not_load_are_essential():
    broken = Extra("", (Package("scipy", ">=1.14", None, "not installed"),), "")
    torch = Torch(error="OSError: libgomp.so.1: cannot open shared object file")
    found = judged(here=replace(HERE, compiler=None), torch=torch, packages=(broken,),
                   running=Threads(4, 0, {}))  # fmt: skip
    assert [finding.essential for finding in found] == [True, True, False]
    assert "'scipy>=1.14'" in found[0].remedy
    assert "libgomp" in found[1].problem


def test_a_missing_extra_is_no_finding():
    ray = Extra(
        "ray", (Package("ray", ">=2", None, "not installed"),), "pip install 'toolkit[ray]'"
    )
    assert judged(packages=(CORE, ray)) == ()
    assert not ray.complete


def test_extras_are_those_of_the_packages_own_metadata():
    found = {extra.name: extra for extra in inspection.extras()}
    declared = set(metadata.metadata("toolkit").get_all("Provides-Extra"))
    assert set(found) - {""} == declared - {"all"}
    assert {"torch", "numpy", "typer"} <= {package.name for package in found[""].packages}
    assert all(package.problem is None for package in found[""].packages)
    assert found["serve"].install.endswith("install 'toolkit[serve]'")
    # An extra lists what it adds, and the core's packages once.
    assert not {p.name for p in found["serve"].packages} & {p.name for p in found[""].packages}


def test_a_package_that_is_too_old_is_not_taken_for_met(monkeypatch):
    version = metadata.version

    def older(name):
        return "0.1" if name == "numpy" else version(name)

    monkeypatch.setattr(metadata, "version", older)
    core = inspection.extras()[0]
    (numpy,) = [package for package in core.packages if package.name == "numpy"]
    assert numpy.problem.startswith("0.1 is installed, >=")


def test_running_without_being_installed_is_no_crash():
    assert inspection.extras("no-such-distribution") == ()


@pytest.fixture
def kernel(tmp_path):
    """A /proc and a control group of a machine that is not this one."""
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 amx_tile amx_bf16\n\n"
        "processor\t: 1\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu\n"
    )
    (tmp_path / "meminfo").write_text("MemTotal:  1048576 kB\nMemAvailable:  524288 kB\n")
    (tmp_path / "memory.max").write_text("268435456\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    return tmp_path


def test_the_kernel_is_read(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "not" / "yet"))
    here = inspection.machine(kernel, kernel)
    assert here.cpu == "Intel(R) Xeon(R)"
    assert here.simd == ("avx2", "amx_tile", "amx_bf16")
    assert (here.memory_bytes, here.available_bytes) == (1 << 30, 1 << 29)
    assert here.memory_limit_bytes == 1 << 28
    assert here.quota_cores == 1.5
    assert here.cache_writable
    assert here.cache_free_bytes > 0


def test_an_unreadable_kernel_is_unknown_and_no_crash(tmp_path):
    here = inspection.machine(tmp_path / "none", tmp_path / "none")
    assert here.memory_bytes is None
    assert here.memory_limit_bytes is None
    assert here.quota_cores is None
    assert here.cpu


def test_a_limit_that_limits_nothing_is_none(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert inspection.memory_limit(tmp_path, 1 << 30) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert inspection.memory_limit(tmp_path, 1 << 30) is None


def test_backends_are_tried_and_not_guessed():
    import torch.distributed as dist

    torch = inspection.torch_build()
    assert torch.error is None
    assert torch.threads >= 1
    assert torch.backends["gloo"] == inspection.WORKS
    assert torch.backends["fake"] == inspection.WORKS
    assert not dist.is_initialized()


def test_a_backend_that_fails_says_why(monkeypatch):
    import torch.distributed as dist

    def refuse(*_, **__):
        raise RuntimeError("unable to resolve hostname\nand a long trace")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    backends = inspection.torch_build().backends
    assert backends["gloo"] == "RuntimeError: unable to resolve hostname"


def test_without_torch_the_rest_is_still_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert inspection.torch_build().error.startswith("ModuleNotFoundError")
    result = runner.invoke(doctor.app, ["--json"])
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert not facts["works"]
    assert facts["machine"]["usable_cores"] >= 1
    assert facts["findings"][0]["essential"]


def test_json_is_one_object_with_every_part():
    result = runner.invoke(doctor.app, ["--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert set(facts) == {
        "works", "machine", "torch", "threads", "extras", "models", "findings"
    }  # fmt: skip
    assert facts["extras"]["core"]["complete"]
    assert "smollm2-135m" in facts["models"]


def test_commands_are_shown_as_they_are_typed(monkeypatch):
    from toolkit.cli import view

    monkeypatch.setattr(view, "out", Console(width=200))
    missing = Extra(
        "ray", (Package("ray", ">=2", None, "not installed"),), "pip install 'toolkit[ray]'"
    )
    monkeypatch.setattr(inspection, "extras", lambda: (CORE, missing))
    monkeypatch.setattr(inspection, "torch_build", lambda: TORCH)
    result = runner.invoke(doctor.app, [])
    assert "pip install 'toolkit[ray]'" in result.stdout


@pytest.mark.parametrize(
    ("cpus", "written"), [((0,), "CPUs 0"), ((0, 1, 2, 5), "CPUs 0-2,5"), ((1, 3), "CPUs 1,3")]
)
def test_cpus_are_written_as_ranges(cpus, written):
    assert doctor._ranges(cpus) == written
