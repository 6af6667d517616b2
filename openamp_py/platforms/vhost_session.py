"""One vhost-user front end: what it has set up so far, and the lives of its driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from openamp_py.constants import VIRTIO_ID_RPMSG
from openamp_py.errors import OpenAMPError, PeerGoneError, VhostUserError
from openamp_py.memory import MemoryMap
from openamp_py.platforms import vhost_wire as wire
from openamp_py.platforms.vhost_descriptors import (
    BackChannel,
    Call,
    Descriptors,
    Kick,
    map_memory,
)
from openamp_py.platforms.vhost_wire import Request
from openamp_py.virtio import Role, ToldWord, VirtioDevice, Vring
from openamp_py.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from openamp_py.vring import VringLayout, VringPlaces

_TO_DRIVER = 0  # the vring that a driver fills with buffers before it is ready
_U16_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back end offers, and what it insists on.

    Args:
        features: virtio features.
        protocol: vhost-user protocol features.
        sealed: guest memory that can be cut off is refused.
        device_id: what kind of virtio device it is.
    """

    features: int
    protocol: int
    sealed: bool = False
    device_id: int = VIRTIO_ID_RPMSG


class _Ring:
    """What the front end has said of one vring."""

    def __init__(self) -> None:
        self.num = 0
        self.places: VringPlaces | None = None
        self.base = 0
        self.kick: Kick | None = None
        self.call: Call | None = None
        self.enabled = False

    def close(self) -> None:
        """Closes its descriptors. Idempotent."""
        for each in (self.kick, self.call):
            if each is not None:
                each.close()
        self.kick = self.call = None


class FrontEnd:
    """One connected front end. Made and closed by the link, for one connection.

    Nobody tells of a driver's status here: a driver is up when both vrings are set up and enabled,
    and the one to it has buffers. That is a life, which ends when a vring is stopped, the device
    is reset, or the memory is another.

    Args:
        offer: what is offered.
        watch: called for each kick descriptor: to be listened to until it is closed, calling
            `look`.
        began: called when a life has begun.

    Attributes:
        life: the device of the present life of the driver; None while there is none.
    """

    def __init__(
        self, offer: Offer, watch: Callable[[Kick], None], began: Callable[[], None]
    ) -> None:
        self._offer = offer
        self._watch = watch
        self._began = began
        self._owned = False
        self._features: int | None = None
        self._protocol = 0
        self._memory: MemoryMap | None = None
        self._rings = tuple(_Ring() for _ in range(wire.QUEUES))
        self._back_channel: BackChannel | None = None
        self.life: VirtioDevice | None = None

    @property
    def acknowledges(self) -> bool:
        """Whether the front end may ask for acknowledgements."""
        return bool(self._protocol & wire.REPLY_ACK)

    def handle_untrusted(
        self, header: wire.Header, payload: bytes, descriptors: Descriptors
    ) -> bytes | None:
        """Does what a request asks.

        Returns:
            What is to be sent back, if anything.

        Raises:
            VhostUserError: no working front end asks that, or not now.
        """
        request = header.request
        if not self._owned and request not in wire.BEFORE_OWNER:
            raise VhostUserError(f"{request.name} came before SET_OWNER")
        needed = wire.NEEDED.get(request, 0)
        if needed & ~self._protocol:
            raise VhostUserError(
                f"{request.name} needs the protocol feature {needed:#x}; accepted are "
                f"{self._protocol:#x}"
            )
        reply = self._handle(request, payload, descriptors)
        wire.check_descriptors(request, len(descriptors), 0)
        if reply is None and header.wants_reply and self.acknowledges:
            reply = wire.encode_u64(0)
        return None if reply is None else wire.encode_reply(request, reply)

    def _handle(self, request: Request, payload: bytes, descriptors: Descriptors) -> bytes | None:
        """Returns the payload of the reply that is due whether it is asked for or not."""
        match request:
            case Request.GET_FEATURES:
                wire.decode_nothing_untrusted(request, payload)
                return wire.encode_u64(self._offer.features | wire.PROTOCOL_FEATURES)
            case Request.GET_PROTOCOL_FEATURES:
                wire.decode_nothing_untrusted(request, payload)
                return wire.encode_u64(self._offer.protocol)
            case Request.GET_QUEUE_NUM:
                wire.decode_nothing_untrusted(request, payload)
                return wire.encode_u64(wire.QUEUES)
            case Request.GET_CONFIG:
                return b""  # which says that there is none of it
            case Request.GET_VRING_BASE:
                return self._stop(payload)
            case Request.SET_OWNER:
                wire.decode_nothing_untrusted(request, payload)
                if self._owned:
                    raise VhostUserError("SET_OWNER came a second time")
                self._owned = True
            case Request.SET_FEATURES:
                self._set_features(payload)
            case Request.SET_PROTOCOL_FEATURES:
                self._set_protocol_features(payload)
            case Request.SET_BACKEND_REQ_FD:
                self._set_back_channel(payload, descriptors)
            case Request.SET_MEM_TABLE:
                places = wire.decode_memory_untrusted(payload)
                memory = map_memory(places, descriptors, sealed=self._offer.sealed)
                self.end_life("the front end changed its memory")
                self._memory = memory
                self.look()
            case Request.SET_CONFIG:
                pass  # there is none
            case Request.RESET_OWNER | Request.RESET_DEVICE:
                wire.decode_nothing_untrusted(request, payload)
                self._reset(request)
            case Request.VRING_KICK:
                wire.decode_value_untrusted(request, payload, _ANY_VALUE)
                self.look()
            case _:
                self._set_ring(request, payload, descriptors)
        return None

    def look(self) -> None:
        """There was a kick, or what counts as one: the driver may be up, or have something.

        Raises:
            VhostUserError: it would be up, but for a vring that cannot be used.
        """
        if self.life is None:
            self._begin_life()
        else:
            self.life.notified()

    def end_life(self, why: str) -> None:
        """The driver is not up any more; its vrings are not touched after this."""
        if self.life is None:
            return
        life, self.life = self.life, None
        life.fail(PeerGoneError(f"{life.name}: {why}"))
        for index, ring in enumerate(self._rings):
            with contextlib.closing(life.open_queue(index)) as queue:
                ring.base = queue.used_index  # what was taken and not given back is taken anew
        life.close()

    def close(self, cause: OpenAMPError) -> None:
        """The connection is over: closes all that came over it. Idempotent."""
        self.end_life(str(cause))
        for ring in self._rings:
            ring.close()
        if self._back_channel is not None:
            self._back_channel.close()
        self._memory = None

    # Inside.

    def _set_features(self, payload: bytes) -> None:
        offered = self._offer.features | wire.PROTOCOL_FEATURES
        features = wire.decode_features_untrusted(Request.SET_FEATURES, payload, offered)
        if features != self._features:
            self._check_idle(Request.SET_FEATURES)
        self._features = features

    def _set_protocol_features(self, payload: bytes) -> None:
        request = Request.SET_PROTOCOL_FEATURES
        protocol = wire.decode_features_untrusted(request, payload, self._offer.protocol)
        if protocol & wire.INBAND and not protocol & wire.BACKEND_REQ:
            raise VhostUserError(
                f"{request.name}: {protocol:#x} has in-band notifications "
                f"({wire.INBAND:#x}) and no channel for calls ({wire.BACKEND_REQ:#x})"
            )
        if protocol != self._protocol:
            self._check_idle(request)
        self._protocol = protocol

    def _set_back_channel(self, payload: bytes, descriptors: Descriptors) -> None:
        request = Request.SET_BACKEND_REQ_FD
        wire.decode_nothing_untrusted(request, payload)
        wire.check_descriptors(request, len(descriptors), 1)
        channel = BackChannel(descriptors.take())
        if self._back_channel is not None:
            self._back_channel.close()
        self._back_channel = channel

    def _set_ring(self, request: Request, payload: bytes, descriptors: Descriptors) -> None:
        match request:
            case Request.SET_VRING_NUM:
                index, num = wire.decode_num_untrusted(payload)
                self._check_idle(request)
                self._rings[index].num = num
            case Request.SET_VRING_BASE:
                index, base = wire.decode_value_untrusted(request, payload, _U16_MAX)
                self._check_idle(request)
                self._rings[index].base = base
            case Request.SET_VRING_ADDR:
                index, places = wire.decode_address_untrusted(payload)
                if places != self._rings[index].places:
                    self._check_idle(request)
                self._rings[index].places = places
            case Request.SET_VRING_ENABLE:
                index, enabled = wire.decode_enable_untrusted(payload)
                if not (self._features or 0) & wire.PROTOCOL_FEATURES:
                    raise VhostUserError(
                        f"{request.name} needs the feature {wire.PROTOCOL_FEATURES:#x}, which was "
                        "not accepted"
                    )
                self._rings[index].enabled = bool(enabled)
                if enabled:
                    self.look()
                else:
                    self.end_life(f"the front end stopped vring {index}")
            case _:
                self._set_descriptor(request, payload, descriptors)

    def _set_descriptor(self, request: Request, payload: bytes, descriptors: Descriptors) -> None:
        index, has_descriptor = wire.decode_descriptor_untrusted(request, payload)
        wire.check_descriptors(request, len(descriptors), int(has_descriptor))
        ring = self._rings[index]
        if request is Request.SET_VRING_CALL:
            call = Call(descriptors.take(), index) if has_descriptor else None
            if ring.call is not None:
                ring.call.close()
            ring.call = call
            # Whoever gave the old one away may have missed what came by it.
            if call is not None and self.life is not None:
                call.call()
        elif request is Request.SET_VRING_KICK:
            if not has_descriptor:
                raise VhostUserError(
                    f"{request.name}: no descriptor for vring {index}; to look at it all the time "
                    "is not done here"
                )
            kick = Kick(descriptors.take(), index)
            if ring.kick is not None:
                ring.kick.close()
            ring.kick = kick
            if not (self._features or 0) & wire.PROTOCOL_FEATURES:
                ring.enabled = True  # which nobody could ask for
            self._watch(kick)
            self.look()
        elif has_descriptor:  # of SET_VRING_ERR: a ring that breaks ends the connection instead
            descriptors.close()

    def _stop(self, payload: bytes) -> bytes:
        """GET_VRING_BASE: stops a vring until it gets a kick descriptor, or a kick, again."""
        index, _ = wire.decode_value_untrusted(Request.GET_VRING_BASE, payload, _ANY_VALUE)
        self.end_life(f"the front end stopped vring {index}")
        ring = self._rings[index]
        ring.close()
        if not (self._features or 0) & wire.PROTOCOL_FEATURES:
            ring.enabled = False
        return wire.encode_value(wire.RingValue(index, ring.base))

    def _reset(self, request: Request) -> None:
        self.end_life(f"the front end reset the device ({request.name})")
        for ring in self._rings:
            ring.enabled = False
            ring.base = 0
        if request is Request.RESET_OWNER:
            self._owned = False

    def _check_idle(self, request: Request) -> None:
        if self.life is not None:
            raise VhostUserError(f"{request.name} came while the driver was up")

    def _begin_life(self) -> None:
        memory, features = self._memory, self._features
        if memory is None or features is None:
            return
        inband = bool(self._protocol & wire.INBAND)
        vrings = []
        for index, ring in enumerate(self._rings):
            if not (ring.enabled and ring.num and ring.places and (inband or ring.kick)):
                return
            # A ring of num entries needs no alignment that its parts do not have by themselves.
            layout = VringLayout(ring.num, _PART_ALIGN)
            vrings.append(
                Vring(ring.places.descriptors, layout, index, ring.places, start=ring.base)
            )
        if inband and self._back_channel is None:
            raise VhostUserError(
                "in-band notifications were accepted, and SET_BACKEND_REQ_FD never came"
            )
        device = VirtioDevice(
            role=Role.DEVICE,
            device_id=self._offer.device_id,
            index=0,
            offered=self._offer.features,
            status=ToldWord(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK),
            accepted=ToldWord(features & ~wire.PROTOCOL_FEATURES),
            vrings=vrings,
            notify_id=0,
            config=memoryview(b""),
            memory=memory,
            kick=self._call,
            buffers=_no_buffers,
        )
        try:
            for index in range(len(vrings)):
                with contextlib.closing(device.open_queue(index)) as queue:
                    if index == _TO_DRIVER and queue.available_index == vrings[index].start:
                        return
        except ValueError as error:
            raise VhostUserError(f"a vring that cannot be used: {error}") from error
        self.life = device
        self._began()

    def _call(self, index: int) -> None:
        """Interrupts the driver for a vring."""
        if self._protocol & wire.INBAND:
            assert self._back_channel is not None, "there is no life without it"
            self._back_channel.send(wire.encode_call(index))
        elif (call := self._rings[index].call) is not None:
            call.call()


# Of layouts whose parts have places of their own.
_PART_ALIGN = 4

_ANY_VALUE = 0xFFFF_FFFF


def _no_buffers(size: int) -> tuple[int, memoryview]:
    raise AssertionError("only a driver brings buffers")
