"""The bus over the kernel's nodes: the calls of `Bus` and `Endpoint`, against a fake kernel."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio.testing

import openamp_py
from openamp_py import (
    AccessDeniedError,
    Announcement,
    BusOptions,
    Channel,
    CrashPolicy,
    Endpoint,
    Message,
    PeerGoneError,
    PlatformError,
    Session,
    open_host_bus,
    open_processor,
)
from openamp_py.constants import ECHO_CHANNEL
from openamp_py.linux import bus as linux_bus
from openamp_py.linux.access import CREATE_ENDPOINT, DESTROY_ENDPOINT, Node
from openamp_py.linux.bus import FIRST_ADDRESS, PAYLOAD_LIMIT, LinuxBus
from openamp_py.linux.endpoint import LinuxEndpoint
from openamp_py.linux.fake import FakeProcessor, FakeTree, open_fake_tree
from openamp_py.linux.fake_bus import FakeRemote
from openamp_py.linux.faults import encode_endpoint
from openamp_py.linux.platform import AS_SET, LinuxPlatform
from openamp_py.linux.tree import read_tree
from openamp_py.remoteproc.crash import NO_POLICY
from openamp_py.rpmsg.wire import SHUTDOWN_REQUEST

QUICK = 0.02


@pytest.fixture
async def tree() -> AsyncIterator[FakeTree]:
    async with open_fake_tree() as tree:
        yield tree


@pytest.fixture
def m4(tree: FakeTree) -> FakeProcessor:
    tree.add_processor("dsp")
    return tree.add_processor("m4")


def open_board(
    tree: FakeTree, policy: CrashPolicy = NO_POLICY
) -> AbstractAsyncContextManager[Session]:
    platform = LinuxPlatform("m4", access=tree, look=QUICK)
    return openamp_py.open_session(platform, policy=policy)


async def leaving_echo(remote: FakeRemote) -> None:
    """As the echo firmware: acknowledges SHUTDOWN_MSG, withdraws its service, and ends."""
    remote.announce(ECHO_CHANNEL, 1024)
    async for message in remote:
        remote.send(message.payload, message.source, source=message.destination)
        if message.payload == SHUTDOWN_REQUEST:
            remote.withdraw(ECHO_CHANNEL, 1024)


# What a program sees


def test_all_that_a_program_can_call_is_replaced() -> None:
    """The base's state is not there, so a call that is not replaced would not work."""
    inherited = {"serve", "hold_nowait", "broken", "check_generation"}
    for base, ours in ((openamp_py.Bus, LinuxBus), (Endpoint, LinuxEndpoint)):
        internal = {  # of the rings: nobody calls them here
            *("open_rings", "rest", "pause", "begin_slice", "tell", "kick", "hush", "drain"),
            *("count_drops", "before_sleep", "after_sleep", "announce", "announcement"),
            *("announces", "was_told", "taken", "in_place", "occupies", "bind", "unbind"),
            *("deliver", "deliver_one", "deliver_kept", "give_up_held", "revive", "vacate"),
            *("handed", "take_over", "inherit", "holds_back", "is_told", "announces_again"),
            *("wants_announcing",),
        }
        for name, member in vars(base).items():
            if name.startswith("_") or name in inherited | internal:
                continue
            assert name in vars(ours), f"{ours.__name__}.{name}"
            if inspect.isfunction(member) and name in ("send", "receive", "wait_service"):
                assert inspect.signature(member) == inspect.signature(vars(ours)[name])


async def test_the_demo_runs_unchanged_and_ends_gracefully(tree: FakeTree) -> None:
    m4 = tree.add_processor("m4", service=leaving_echo)
    async with (
        open_board(tree) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.send(b"hello, core")
        assert await endpoint.receive() == Message(b"hello, core", 1024)
        shutdown = await session.shutdown(endpoint, grace=5.0)
        assert str(shutdown) == "graceful", shutdown.reason
    assert m4.state == "offline"


async def test_the_session_is_opened_by_url(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openamp_py.linux.platform.MachineAccess", lambda: tree)
    async with openamp_py.open_session("linux:m4") as session:
        assert await session.bus.wait_service("rpmsg-raw") == Channel("rpmsg-raw", 1025)
    assert m4.state == "offline"


async def test_messages_of_every_size_and_their_order(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        assert endpoint.payload_limit == PAYLOAD_LIMIT == 496
        for size in range(PAYLOAD_LIMIT + 1):
            payload = bytes([size % 251]) * size
            await endpoint.send(payload)
            assert (await endpoint.receive()).payload == payload
        await endpoint.send_many([b"a", b"", b"b"])
        await trio.testing.wait_all_tasks_blocked()
        got = [message.payload for message in await endpoint.receive_many()]
        assert got == [b"a", b"", b"b"]
        with pytest.raises(ValueError, match=r"497 bytes; the limit is 496"):
            await endpoint.send(bytes(PAYLOAD_LIMIT + 1))
        assert endpoint.statistics.sent == endpoint.statistics.received == PAYLOAD_LIMIT + 4
        assert session.bus.statistics.sent == PAYLOAD_LIMIT + 4


async def test_several_endpoints_each_with_its_own_node(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_board(tree) as session:
        bus = session.bus
        async with (
            bus.open_endpoint(ECHO_CHANNEL) as one,
            bus.open_endpoint(ECHO_CHANNEL) as other,
            bus.open_endpoint("mine", destination=1024) as fixed,
        ):
            assert [one.address, other.address, fixed.address] == [
                FIRST_ADDRESS + number for number in range(3)
            ]
            for endpoint in (one, other, fixed):
                await endpoint.send(repr(endpoint).encode())
            for endpoint in (fixed, other, one):
                assert (await endpoint.receive()).payload == repr(endpoint).encode()
            assert len(read_tree(tree).endpoints) == 4  # and rpmsg-raw's own
        assert len(read_tree(tree).endpoints) == 1


async def test_the_bus_is_that_of_the_processor(tree: FakeTree, m4: FakeProcessor) -> None:
    """The numbers of control nodes do not correspond to those of processors."""
    dsp = LinuxPlatform("dsp", access=tree, look=QUICK)
    async with (
        openamp_py.open_session(dsp),
        open_board(tree) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        assert isinstance(endpoint, LinuxEndpoint)
        (mine,) = [e for e in read_tree(tree).endpoints if e.name == ECHO_CHANNEL]
        assert mine.processor == m4.kernel_name
        assert mine.node == endpoint.node


async def test_the_kernels_own_node_of_a_raw_service_is_used(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session:
        await session.bus.wait_service("rpmsg-raw")
        before = read_tree(tree).endpoints
        async with session.bus.open_endpoint("rpmsg-raw") as raw:
            assert read_tree(tree).endpoints == before
            await raw.send(b"raw")
            assert (await raw.receive()).payload == b"raw"
            async with session.bus.open_endpoint("rpmsg-raw") as second:  # that is in use
                await second.send(b"2")
                assert (await second.receive()).payload == b"2"
        assert read_tree(tree).endpoints == before  # which nobody may destroy


async def test_services_come_and_go(tree: FakeTree) -> None:
    async def service(remote: FakeRemote) -> None:
        async for message in remote:
            remote.send(message.payload, message.source, source=message.destination)

    m4 = tree.add_processor("m4", service=service)
    async with open_board(tree) as session, session.bus.open_watch() as watch:
        remote = m4.remote
        assert remote is not None
        async with session.bus.open_endpoint("late") as endpoint:
            assert not endpoint.is_bound
            with pytest.raises(trio.WouldBlock):
                endpoint.send_nowait(b"too early")
            remote.announce("late", 1030)
            await endpoint.wait_bound()
            assert endpoint.destination == 1030
            await endpoint.send(b"x")
            await trio.testing.wait_all_tasks_blocked()
            remote.withdraw("late", 1030)
            assert (await endpoint.receive()).payload == b"x"
            with pytest.raises(trio.EndOfChannel):
                await endpoint.receive()
            assert endpoint.is_withdrawn
            with pytest.raises(trio.BrokenResourceError, match="withdrew"):
                await endpoint.send(b"nobody")
            remote.announce("late", 1031)
            assert await anext(watch) == Announcement(Channel("late", 1030))
            assert await anext(watch) == Announcement(Channel("late", 1030), destroy=True)
            assert await anext(watch) == Announcement(Channel("late", 1031))
            await endpoint.wait_bound()
            assert endpoint.destination == 1031


async def test_each_announcement_is_read_once(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remote that announces without end would have all of them read each time."""
    async with open_board(tree) as session:
        assert m4.remote is not None
        for address in range(5000, 5020):
            m4.remote.announce("many", address)
        assert len([each for each in session.bus.channels if each.name == "many"]) == 20
        paths: list[str] = []
        read = tree.read

        def record(path: str, size: int = 4096, offset: int = 0) -> bytes:
            paths.append(path)
            return read(path, size, offset)

        monkeypatch.setattr(tree, "read", record)
        m4.remote.announce("one more", 6000)
        assert Channel("one more", 6000) in session.bus.channels
        assert {path.split("/")[-2] for path in paths} == {"virtio0.one more.-1.6000"}
        paths.clear()
        m4.remote.withdraw("many", 5000)
        assert Channel("many", 5000) not in session.bus.channels
        assert not paths


async def test_an_announcement_that_could_not_be_read_is_read_later(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session:
        assert m4.remote is not None
        tree.hide("*/virtio0.late.*/name")
        m4.remote.announce("late", 5000)
        assert "late" not in [each.name for each in session.bus.channels]
        tree.restore("*/virtio0.late.*/name")
        assert Channel("late", 5000) in session.bus.channels


async def test_an_endpoint_without_a_name_is_made_by_its_first_message(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint() as endpoint:
        channel = await session.bus.wait_service(ECHO_CHANNEL)
        await endpoint.send_to(b"to whom", channel.address)
        assert await endpoint.receive() == Message(b"to whom", 1024)
        with pytest.raises(PlatformError, match="fixes the destination"):
            await endpoint.send_to(b"x", 1025)


async def test_serve_answers_until_the_channel_ends(tree: FakeTree) -> None:
    async def service(remote: FakeRemote) -> None:
        remote.announce("ask", 1024)
        async for message in remote:
            if message.payload == b"answer":
                remote.withdraw("ask", 1024)
            else:
                remote.send(b"question", message.source, source=1024)

    tree.add_processor("m4", service=service)
    async with open_board(tree) as session, session.bus.open_endpoint("ask") as endpoint:

        async def answer(message: Message) -> None:
            await endpoint.send_to(b"answer", message.source)

        await endpoint.send(b"begin")
        await endpoint.serve(answer)


# A full bus


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
async def test_a_full_bus_is_waited_for_though_nothing_tells_when(
    tree: FakeTree, code: int
) -> None:
    """EPOLLOUT never comes before Linux 7."""
    free = trio.Event()
    got = []

    async def service(remote: FakeRemote) -> None:
        remote.announce(ECHO_CHANNEL, 1024)
        await free.wait()
        async for message in remote:
            got.append(message.payload)

    tree.add_processor("m4", service=service, buffers=2, full=code)
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.send(b"0")
        await endpoint.send(b"1")
        with pytest.raises(trio.WouldBlock):
            endpoint.send_nowait(b"full")
        assert endpoint.statistics.sent == 2
        with trio.move_on_after(QUICK) as scope:
            await endpoint.send(b"cancelled")
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.send, b"2")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(endpoint.send, b"3")
            await trio.testing.wait_all_tasks_blocked()
            free.set()
        await trio.testing.wait_all_tasks_blocked()
        assert got == [b"0", b"1", b"2", b"3"]
        assert endpoint.statistics.buffer_waits >= 3


# When it breaks


async def test_a_crash_breaks_endpoints_and_rebind_brings_them_back(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with (
        open_board(tree, policy=CrashPolicy(recovery=True)) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        session.bus.open_endpoint(ECHO_CHANNEL) as mortal,
    ):
        for number in range(3):
            await endpoint.send(b"there?")
            assert (await endpoint.receive()).payload == b"there?"
            async with trio.open_nursery() as nursery:

                async def wait_broken() -> None:
                    with pytest.raises(trio.BrokenResourceError) as caught:
                        await endpoint.receive()
                    assert isinstance(caught.value.__cause__, openamp_py.OpenAMPError)

                nursery.start_soon(wait_broken)
                await trio.testing.wait_all_tasks_blocked()
                m4.crash()
            await session.wait_up()
            await endpoint.wait_bound()
            assert session.bus.generation == number + 1
        with pytest.raises(trio.BrokenResourceError):
            await mortal.send(b"x")


async def test_the_cause_is_the_crash_where_the_kernel_says_so(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    platform = LinuxPlatform("m4", access=tree, look=QUICK, recovery=False)
    async with (
        openamp_py.open_session(platform) as session,
        session.bus.open_endpoint(ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.wait_bound()
        m4.crash()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await endpoint.receive()
        assert isinstance(caught.value.__cause__, openamp_py.CoreCrashedError)
        assert isinstance(await session.bus.wait_failure(), openamp_py.CoreCrashedError)


async def test_a_restart_goes_on_over_the_new_bus(tree: FakeTree, m4: FakeProcessor) -> None:
    async with (
        open_board(tree) as session,
        session.bus.open_endpoint(ECHO_CHANNEL, rebind=True) as endpoint,
        session.bus.open_endpoint("mine", destination=1024, rebind=True) as fixed,
    ):
        await endpoint.wait_bound()
        await session.restart()
        for each in (endpoint, fixed):
            await each.send(b"again")
            assert (await each.receive()).payload == b"again"


async def test_an_endpoint_that_somebody_destroys_is_broken_and_the_bus_is_not(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session:
        async with session.bus.open_endpoint("mine", destination=1024) as endpoint:
            (made,) = [e for e in read_tree(tree).endpoints if e.name == "mine"]
            with pytest.raises(OSError) as busy:
                tree.open_node(made.node)
            assert busy.value.errno == errno.EBUSY
            assert isinstance(endpoint, LinuxEndpoint)
            assert endpoint._open is not None
            endpoint._open.node.ioctl(DESTROY_ENDPOINT)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await endpoint.receive()
            assert isinstance(caught.value.__cause__, PeerGoneError)
        async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            await endpoint.send(b"well")
            assert (await endpoint.receive()).payload == b"well"


async def test_an_opening_that_is_given_up_leaves_no_node(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nobody waits any more, or the node could not be opened in time."""
    opens = tree.open_node
    refused: list[str] = []

    def refuse_once(path: str) -> Node:
        if path not in refused:
            refused.append(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opens(path)

    async with open_board(tree) as session:
        control = read_tree(tree).controls[0].kernel_name
        monkeypatch.setattr(tree, "open_node", refuse_once)
        for grace, kind in ((linux_bus.NODE_GRACE, trio.TooSlowError), (0.0, AccessDeniedError)):
            refused.clear()
            monkeypatch.setattr(linux_bus, "NODE_GRACE", grace)
            with pytest.raises(kind), trio.fail_after(0 if grace else 60):
                await session.bus.wait_service(ECHO_CHANNEL)
                async with session.bus.open_endpoint(ECHO_CHANNEL):
                    pass
            assert [e for e in read_tree(tree).endpoints if e.control == control] == []


async def test_a_name_that_is_given_out_again_is_found(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program closes its endpoint just before ours is made."""
    async with open_board(tree) as session:
        control = tree.open_node("/dev/rpmsg_ctrl0")
        control.ioctl(CREATE_ENDPOINT, encode_endpoint("other", 3000, 1024))
        control.close()
        (made,) = [e for e in read_tree(tree).endpoints if e.name == "other"]
        other = tree.open_node(made.node)
        ours = session.bus._control  # type: ignore[attr-defined]
        ioctl = ours.ioctl

        def close_first(request: int, argument: bytes | int = 0) -> bytes:
            other.ioctl(DESTROY_ENDPOINT)
            other.close()
            return bytes(ioctl(request, argument))

        monkeypatch.setattr(ours, "ioctl", close_first)
        monkeypatch.setattr(linux_bus, "NODE_GRACE", QUICK)
        async with session.bus.open_endpoint("mine", destination=1024) as endpoint:
            assert isinstance(endpoint, LinuxEndpoint)
            assert endpoint.node == made.node


async def test_a_named_endpoint_that_somebody_destroys_is_not_made_anew_and_broken_later(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        assert isinstance(endpoint, LinuxEndpoint)
        assert endpoint._open is not None
        address, node = endpoint.address, endpoint._open.node
        node.ioctl(DESTROY_ENDPOINT)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await endpoint.receive()
        assert isinstance(caught.value.__cause__, PeerGoneError)
        assert (endpoint.address, endpoint.node) == (address, None)


async def test_an_endpoint_that_cannot_go_on_is_broken_alone(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """In the next life its address is another's."""
    async with open_board(tree) as session:
        bus = session.bus
        assert isinstance(bus, LinuxBus)
        async with (
            bus.open_endpoint("a", address=3000, destination=1024, rebind=True) as one,
            bus.open_endpoint("b", address=3001, destination=1024, rebind=True) as two,
        ):
            bus._wanted[two] = 3000
            await session.restart()
            well, ill = (one, two) if one.is_bound else (two, one)
            await well.send(b"on it goes")
            with pytest.raises(trio.BrokenResourceError, match="0xbb8 is in use"):
                await ill.send(b"no address")


async def test_a_node_that_comes_at_once_is_not_waited_for_long(
    tree: FakeTree,
    m4: FakeProcessor,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The promise is 5 ms beside what the kernel and udev take, here 1 ms."""
    opens = tree.open_node
    there = 0.0

    def late(path: str) -> Node:
        if trio.current_time() < there:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return opens(path)

    async with open_board(tree) as session:
        await session.bus.wait_service(ECHO_CHANNEL)
        monkeypatch.setattr(tree, "open_node", late)
        began = trio.current_time()
        there = began + 0.001
        async with session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
            assert endpoint.is_bound
            assert trio.current_time() - there < 0.004


async def test_closing_wakes_who_waits(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        async with trio.open_nursery() as nursery:

            async def wait_closed() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await endpoint.receive()

            nursery.start_soon(wait_closed)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await endpoint.receive()
            await endpoint.aclose()
        await endpoint.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await endpoint.send(b"x")


# Refusals


async def test_nodes_that_this_user_may_not_open(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux_bus, "NODE_GRACE", QUICK)

    def refuse(path: str) -> Node:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(tree, "open_node", refuse)
    with pytest.raises(AccessDeniedError, match=r"/dev/rpmsg_ctrl0.*udev rule") as caught:
        async with open_board(tree):
            pass
    assert isinstance(caught.value, PermissionError)
    assert m4.state == "offline"


async def test_a_node_gets_its_group_a_little_later(
    tree: FakeTree, m4: FakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = tree.open_node
    tries: dict[str, int] = {}

    def late(path: str) -> Node:
        tries[path] = tries.get(path, 0) + 1
        if tries[path] < 4:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opens(path)

    monkeypatch.setattr(tree, "open_node", late)
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.send(b"x")
        assert (await endpoint.receive()).payload == b"x"


async def test_without_the_module_there_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linux_bus, "BUS_GRACE", QUICK)
    async with open_fake_tree(modules=()) as tree:
        m4 = tree.add_processor("m4")
        with pytest.raises(PlatformError, match=r"rpmsg_ctrl.*openamp doctor"):
            async with open_board(tree):
                pass
        assert m4.state == "offline"


async def test_addresses_that_are_in_use_or_impossible(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_board(tree) as session:
        async with session.bus.open_endpoint("a", address=3000, destination=1024) as one:
            assert one.address == 3000
            with pytest.raises(ValueError, match="0xbb8 is in use"):
                async with session.bus.open_endpoint("b", address=3000, destination=1024):
                    pass
        for address, destination, limit in ((53, 1, 1), (0, 1 << 32, 1), (0, 1, 0)):
            with pytest.raises(ValueError):
                async with session.bus.open_endpoint(
                    "c", address=address, destination=destination, queue_limit=limit
                ):
                    pass
        with pytest.raises(ValueError):
            async with session.bus.open_endpoint("x" * 32):
                pass


async def test_an_address_that_sysfs_does_not_show_is_passed_over(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """Another program left the address open, and was given one of ours."""
    async with open_board(tree) as session:
        control = tree.open_node("/dev/rpmsg_ctrl0")
        control.ioctl(CREATE_ENDPOINT, encode_endpoint("other", FIRST_ADDRESS, 1024))
        control.close()
        (made,) = [e for e in read_tree(tree).endpoints if e.name == "other"]
        other = tree.open_node(made.node)
        tree.put(f"{made.path}/src", "-1\n")
        async with session.bus.open_endpoint("mine", destination=1024) as endpoint:
            assert endpoint.address == FIRST_ADDRESS + 1
        other.close()


async def test_what_the_kernel_has_is_refused(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        with pytest.raises(PlatformError):
            await endpoint.send_from(b"x", 1, 2)
        with pytest.raises(PlatformError):
            async with endpoint.reserve():
                pass
        with pytest.raises(PlatformError), endpoint.reserve_nowait():
            pass
        with pytest.raises(PlatformError):
            await endpoint.hold()
        with pytest.raises(PlatformError):
            session.bus.recent()
        with pytest.raises(PlatformError):
            async with session.bus.open_endpoint("x", in_place=True):
                pass


async def test_a_dump_and_what_is_known_of_a_silent_remote(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        dump = session.bus.dump()
        assert "linux:m4 (virtio0)" in str(dump)
        assert dump.to_json()
        silence = await session.describe_silence()
        assert "is running, the kernel says" in silence
        assert "last line of its trace: 'booted: echo of fake.elf'" in silence


async def test_a_heartbeat_finds_a_core_that_hangs(tree: FakeTree) -> None:
    silent = False

    async def service(remote: FakeRemote) -> None:
        remote.announce(ECHO_CHANNEL, 1024)
        async for message in remote:
            if not silent:
                remote.send(message.payload, message.source, source=message.destination)

    tree.add_processor("m4", service=service)
    async with open_board(tree) as session, session.open_heartbeat(silence=0.3):
        await trio.sleep(0.5)
        assert session.bus.failure is None
        silent = True
        assert isinstance(await session.bus.wait_failure(), openamp_py.OpenAMPError)


async def test_open_host_bus_is_the_same_bus(tree: FakeTree, m4: FakeProcessor) -> None:
    async with open_processor(LinuxPlatform("m4", access=tree)) as processor:
        await processor.boot(AS_SET)
        async with open_host_bus(processor, BusOptions()) as bus:
            assert isinstance(bus, LinuxBus)
            assert Session(bus, processor).bus is bus
        with pytest.raises(trio.ClosedResourceError):
            await bus.wait_service("x")


async def test_without_a_control_node_a_tty_carries_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linux_bus, "BUS_GRACE", QUICK)

    async def service(remote: FakeRemote) -> None:
        remote.announce("rpmsg-tty", 1024)
        async for message in remote:
            remote.send(message.payload, message.source, source=1024)

    async with open_fake_tree(modules=("virtio_rpmsg_bus", "rpmsg_tty")) as tree:
        tree.add_processor("m4", service=service)
        async with open_board(tree) as session:
            async with session.bus.open_endpoint("rpmsg-tty") as endpoint:
                await endpoint.send(b"bytes\n")
                assert (await endpoint.receive()).payload == b"bytes\n"
                with pytest.raises(ValueError, match="no empty messages"):
                    await endpoint.send(b"")
            with pytest.raises(PlatformError, match="rpmsg_ctrl"):
                async with session.bus.open_endpoint("mine", destination=1024):
                    pass


async def test_a_node_that_went_is_in_doubt_until_its_bus_had_time_to_go(
    tree: FakeTree, m4: FakeProcessor
) -> None:
    """The kernel ends the endpoints of a bus before the bus."""
    async with open_board(tree) as session, session.bus.open_endpoint(ECHO_CHANNEL) as endpoint:
        await endpoint.wait_bound()
        assert isinstance(endpoint, LinuxEndpoint)
        assert isinstance(session.bus, LinuxBus)
        session.bus.doubt(endpoint, PeerGoneError("the endpoint alone"))
        session.bus.look()
        assert endpoint.failure is None
        m4.crash()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await endpoint.receive()
        assert "the endpoint alone" not in str(caught.value.__cause__)
