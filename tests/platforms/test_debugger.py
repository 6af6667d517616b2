"""Where a debugger is waited for."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from openamp_py.errors import PlatformError
from openamp_py.platforms.debugger import Listener


def test_a_port_of_this_machine_alone() -> None:
    listener = Listener("0")
    listener.open()
    try:
        host, port = listener.address.split(":")
        assert host == "localhost" and int(port) > 0
        assert listener.socket is not None
        assert listener.socket.getsockname() == ("127.0.0.1", int(port))
        socket.create_connection(("127.0.0.1", int(port))).close()
    finally:
        listener.close()
    listener.close()


def test_a_path_goes_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    listener = Listener(f"unix:{path}")
    assert listener.address == str(path) and not path.exists()
    listener.open()
    assert path.is_socket()
    path.unlink()  # somebody tidied up
    listener.close()
    listener.open()
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize(
    "address", ["", "x", "-1", "65536", "1.5", "unix:", "unix:a\0b", "localhost:1"]
)
def test_what_is_no_place_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no place for a debugger"):
        Listener(address)


def test_a_place_that_is_taken_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    path.touch()
    with pytest.raises(
        PlatformError, match=f"waited for at {path}: Address already in use; remove it"
    ):
        Listener(f"unix:{path}").open()
    assert path.exists()
    with pytest.raises(PlatformError, match="AF_UNIX path too long"):
        Listener("unix:/" + "x" * 200).open()
