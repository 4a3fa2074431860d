"""The compiled CPU kernels, compiled once for all tests."""

from __future__ import annotations

import ctypes

import pytest
from chiron_kernels.cpu.library import MachineUnsuited, has_vnni, open_library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        return open_library(tmp_path_factory.mktemp("kernels"))
    except MachineUnsuited as error:  # whatever else is wrong fails the tests
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vnni_library(library: ctypes.CDLL) -> ctypes.CDLL:
    if not has_vnni():
        pytest.skip("the CPU lacks avx512_vnni")
    return library
