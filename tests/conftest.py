"""How tests share a machine, and where values of kernels are checked.

``pytest`` alone runs everything in one process; ``pytest -n auto --dist loadfile`` in as many as
there are cores, at most ``MOST``, a file at a time in each. Either way a process has one thread:
small products wait longer for the threads of another process than they take.

Values of kernels run under triton's interpreter in a process of their own, and each is reported
under its own id.

The decorator of a kernel reads TRITON_INTERPRET when it is imported, and the compile gate wants it
unset. So tests marked ``interpreted`` are collected here, but called in a child with that variable,
which says of each how it went as soon as it has ended: a child for all that are chosen, beside the
other tests, or under ``-n`` a child for each file. On a CUDA device they run here, compiled; with
the variable set by hand, here, interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for children

MOST = 4  # processes of ``-n auto``: each takes up to a gigabyte
_REPORTS = "UFM_TEST_REPORTS"  # the child's file descriptor to write to
CHILDREN = pytest.StashKey[dict[Path | None, "Child"]]()


class Child:
    """A pytest of some node ids under the interpreter."""

    def __init__(self, config: pytest.Config, ids: Sequence[str]) -> None:
        read, write = os.pipe()
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            _REPORTS: str(write),
        }
        command = [sys.executable, "-m", "pytest", "--rootdir", str(config.rootpath), *ids]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the child)
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=config.rootpath,
            pass_fds=[write],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        os.close(write)
        self.reports = os.fdopen(read, encoding="utf-8")
        self.known: dict[str, tuple[str, str]] = {}

    def report(self, name: str) -> tuple[str, str]:
        """(outcome, text) of a test, once it has ended."""
        while name not in self.known:
            line = self.reports.readline()
            if not line:
                self.output.seek(0)
                return (
                    "failed",
                    f"the process of the interpreter ended without "
                    f"it:\n{self.output.read()[-4000:]}",
                )
            ended, outcome, text = json.loads(line)
            self.known[ended] = outcome, text
        return self.known[name]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.reports.close()
        self.output.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST, allowed or 1)


def _in_child(item: pytest.Item) -> bool:
    if item.get_closest_marker("interpreted") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    import torch

    return not torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not _in_child(pyfuncitem):
        return None
    outcome, text = _child_of(pyfuncitem).report(pyfuncitem.nodeid)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    if outcome == "skipped":
        pytest.skip(text)
    return True


def _child_of(item: pytest.Function) -> Child:
    """The child that runs this test; under ``-n`` a process sees every item, and runs a file."""
    children = item.session.stash.setdefault(CHILDREN, {})
    of = item.path if hasattr(item.config, "workerinput") else None
    if of not in children:
        ids = [
            one.nodeid for one in item.session.items if _in_child(one) and of in (None, one.path)
        ]
        children[of] = Child(item.config, ids)
    return children[of]


def pytest_sessionfinish(session: pytest.Session) -> None:
    for child in session.stash.get(CHILDREN, {}).values():
        child.close()


_worst: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: each test's outcome, when its teardown has ended."""
    if _REPORTS not in os.environ:
        return
    if report.outcome != "passed" and report.nodeid not in _worst:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _worst[report.nodeid] = report.outcome, text
    if report.when == "teardown":
        line = json.dumps([report.nodeid, *_worst.pop(report.nodeid, ("passed", ""))])
        os.write(int(os.environ[_REPORTS]), (line + "\n").encode())


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rates that a plan measures are kept for these tests alone, never in the user's cache."""
    folder, before = tmp_path_factory.mktemp("cache"), os.environ.get("UFM_FAST_CACHE")
    os.environ["UFM_FAST_CACHE"] = str(folder)
    yield folder
    os.environ.pop("UFM_FAST_CACHE")
    if before is not None:
        os.environ["UFM_FAST_CACHE"] = before
