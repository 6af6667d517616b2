"""Pieces of scripts that guests run."""

from __future__ import annotations

RPROC = "/sys/class/remoteproc/remoteproc0"
CHANNELS = "/sys/bus/rpmsg/devices"

START = f"echo start >{RPROC}/state\n"
STOP = f"echo stop >{RPROC}/state\n"


def wait_for(path: str) -> str:
    """Waits until a file is there."""
    return f"until [ -e {path} ]; do sleep 0.01; done\n"


def wait_gone(path: str) -> str:
    """Waits until a file is not there any more."""
    return f"while [ -e {path} ]; do sleep 0.01; done\n"


def wait_state(state: str) -> str:
    """Waits until the remote processor is in a state."""
    return f'until [ "$(cat {RPROC}/state)" = {state} ]; do sleep 0.01; done\n'
