"""Runs pytest as a user does: with the plugin installed, in a directory of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

# What most of them need: an endpoint that is bound to the echo service.
HEAD = """
import pytest, trio
import openamp_py
from openamp_py import ECHO_CHANNEL

@pytest.fixture
async def endpoint(openamp_bus):
    async with openamp_bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        yield endpoint
"""

# pytest would also rewrite the asserts of a package that brings a plugin, if it came first.
INI = """
[pytest]
filterwarnings =
    error
    ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning
"""

RunTests = Callable[..., pytest.RunResult]


@pytest.fixture
def run_tests(pytester: pytest.Pytester) -> RunTests:
    """Runs tests that are given as text; `ini` is what their pytest.ini says.

    In this process, which is quicker; tests that fail keep what they had by their tracebacks, and
    so have a process of their own.
    """

    def run(text: str, *arguments: str, ini: str = "", own: bool = False) -> pytest.RunResult:
        pytester.makeini(f"{INI}{ini}")
        pytester.makepyfile(test_firmware=HEAD + text)
        if own:
            return pytester.runpytest_subprocess("--strict-markers", *arguments, timeout=60)
        return pytester.runpytest_inprocess("--strict-markers", *arguments)

    return run
