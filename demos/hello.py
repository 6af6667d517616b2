import trio

import openamp_py


async def main() -> None:
    async with (
        openamp_py.open_session("native") as session,  # boots the shipped echo firmware
        session.bus.open_endpoint(openamp_py.ECHO_CHANNEL) as endpoint,
    ):
        await endpoint.send(b"hello, core")
        message = await endpoint.receive()
        print(f"{message.payload!r} from address {message.source:#x}")
        print("shutdown:", await session.shutdown(endpoint, grace=1.0))


trio.run(main)
