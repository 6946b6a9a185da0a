import importlib.util
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from sparsekit import machine
from sparsekit.errors import SettingsError
from sparsekit.machine import find_device


def test_it_can_be_imported_where_there_is_no_resource_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("machine_again", machine.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_on_windows_peak_memory_is_the_peak_working_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert machine.peak_memory(nn.Linear(1, 1)) == 12345


def test_peak_memory_is_in_bytes():
    assert 2**25 < machine.peak_memory(nn.Linear(1, 1)) < 2**40


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the whole process's")
def test_peak_memory_is_that_since_it_was_forgotten():
    model = nn.Linear(1, 1)
    large = torch.ones(2**27)
    with_it = machine.peak_memory(model)
    del large
    machine.forget_peak_memory(torch.device("cpu"))
    assert machine.peak_memory(model) < with_it - 2**28


@pytest.mark.parametrize("asked", ["gpu", "cuda:99", "fft"])
def test_a_device_that_is_not_there_is_one_sentence(asked):
    with pytest.raises(SettingsError, match=f"device '{asked}' was asked for; torch finds .* here. Use --device cpu"):
        find_device(asked)
