"""Windows and macOS, which no test has run on: what they lack or do otherwise, simulated on Linux."""

import errno
import fcntl
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, open_run

from minillm.errors import InputError
from minillm.io import disk
from minillm.io.disk import sync, write_atomically, write_text
from minillm.io.rankings import JsonLines
from minillm.ppo import moments
from minillm.run import Runtime
from minillm.tools.ending import handle_signals
from minillm.tools.folder import hold, lock


@pytest.fixture
def windows(monkeypatch) -> SimpleNamespace:
    """No fcntl; msvcrt, whose lock is of a byte at the place where the file is; folders that cannot be
    opened; files that can be synced only where they may be written; no SIGHUP."""
    real, flags = os.open, {}

    def locking(handle: int, mode: int, count: int) -> None:
        assert mode == 2 and count == 1
        place = os.lseek(handle, 0, os.SEEK_CUR)
        assert place > os.fstat(handle).st_size, "others could not read what is locked"
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EACCES, "Permission denied") from None

    def open_file(path, how, *mode, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = real(path, how, *mode, **more)
        flags[handle] = how
        return handle

    def fsync(handle: int) -> None:
        if flags.get(handle, os.O_RDWR) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(disk, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr("minillm.io.disk.os.open", open_file)
    monkeypatch.setattr("minillm.io.disk.os.fsync", fsync)
    monkeypatch.delattr(signal, "SIGHUP")
    return SimpleNamespace(locking=locking)


def test_without_fcntl_a_folder_and_a_file_have_one_owner_and_others_wait_or_are_told(tmp_path, windows):
    with hold(tmp_path / "run", wait=False):
        with pytest.raises(BlockingIOError), hold(tmp_path / "run", wait=False):
            pass
        with pytest.raises(InputError, match="another run is writing"):
            open_run(tmp_path / "run")
    with hold(tmp_path / "run", wait=True):
        pass
    with JsonLines(tmp_path / "x.jsonl") as file:
        file.append([{"a": 1}])
        with pytest.raises(InputError, match="another process"):
            JsonLines(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'


def test_without_fcntl_whoever_waits_for_a_lock_gets_it(tmp_path, windows, monkeypatch):
    first, second = (os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    lock(first, wait=False)
    monkeypatch.setattr("minillm.tools.folder.time.sleep", lambda seconds: os.close(first))
    lock(second, wait=True)
    os.close(second)


def test_where_folders_cannot_be_opened_files_are_synced_and_written_whole(tmp_path, windows):
    write_text(tmp_path / "x", "new")
    sync(tmp_path)
    assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_two_processes_that_write_one_file_at_once_each_write_it_whole(tmp_path):
    """What others were writing is left to them while they are there."""
    path, code = tmp_path / "a.json", "from minillm.io.disk import *; write_text(Path('{}'), 'b')"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".a.json.{other.pid}.tmp"
        theirs.write_text("half")

        def write(file: Path) -> None:
            file.write_text("a")
            subprocess.run([sys.executable, "-c", code.format(path)], cwd=ROOT, check=True)
            assert (path.read_text(), file.read_text()) == ("b", "a")

        write_atomically(path, write)
        assert path.read_text() == "a" and set(tmp_path.iterdir()) == {path, theirs}
    write_text(path, "c")
    assert path.read_text() == "c" and list(tmp_path.iterdir()) == [path]


def test_without_hangups_the_other_signals_are_handled(windows):
    before = handle_signals(signal.default_int_handler)
    assert set(before) == {signal.SIGINT, signal.SIGTERM}
    for number, handler in before.items():
        signal.signal(number, handler)


def test_no_module_needs_what_windows_lacks():
    """Every one is imported in a process without the modules and names that are of Unix alone."""
    code = """
import importlib, os, pkgutil, signal, sys
import torch, asyncio, matplotlib, subprocess, uvicorn  # these know both systems
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGALRM", "setitimer"):
    delattr(signal, name)
for name in ("fork", "sysconf", "geteuid"):
    delattr(os, name)
import minillm, train, sft, rlhf
for found in pkgutil.walk_packages(minillm.__path__, "minillm."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("refused", [False, True])
def test_on_macos_a_sync_reaches_the_disk_itself_where_the_file_system_can(tmp_path, monkeypatch, refused):
    asked = []

    def control(handle: int, command: int) -> None:
        asked.append(command)
        if refused:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(disk, "fcntl", SimpleNamespace(F_FULLFSYNC=51, fcntl=control))
    write_text(tmp_path / "x", "new")
    assert asked == [51, 51]  # the file, and its name
    assert (tmp_path / "x").read_text() == "new"


class OnMetal(torch.Tensor):
    """A tensor that computes as on Apple's GPUs: what would be of float64 there is refused."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is torch.Tensor.cpu:
            return arguments[0].as_subclass(torch.Tensor).clone()
        made = super().__torch_function__(function, types, arguments, keywords)
        if isinstance(made, cls) and made.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made


def test_sums_in_float64_are_made_on_the_cpu():
    values = torch.tensor([1.0, 2.0, 6.0])
    expected = moments(values, Runtime(torch.device("cpu"), torch.float32))
    assert moments(values.as_subclass(OnMetal), Runtime(torch.device("cpu"), torch.float32)) == expected
    with pytest.raises(TypeError, match="MPS"):
        values.as_subclass(OnMetal).double()


def test_this_system_has_what_is_simulated_away():
    assert importlib.import_module("fcntl") is disk.fcntl
