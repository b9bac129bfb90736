"""A server whose times are known: no model, a first token after a fixed time, then one each gap.

`python -m benchmarks.compare.fixed_server --port 8000 --ttft-ms 200 --itl-ms 20`. What
`benchmarks.compare.clients` measures load clients against: whoever reads other times is wrong.
"""

import argparse
import asyncio

import msgspec
from aiohttp import web


async def health(request: web.Request) -> web.Response:
    return web.Response()


class Server:
    """Streams `max_tokens` words, each when it is due after the request's arrival."""

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self.ttft_s, self.itl_s = ttft_s, itl_s

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", health)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        body = msgspec.json.decode(await request.read())
        count = int(body["max_tokens"])
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(request)
        for number in range(count):
            await asyncio.sleep(arrived + self.ttft_s + number * self.itl_s - loop.time())
            await out.write(_event({"choices": [{"index": 0, "text": " x"}]}))
        usage = {"completion_tokens": count}
        await out.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        await out.write_eof()
        return out


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare.fixed_server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft-ms", type=float, default=200.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    args = parser.parse_args()
    server = Server(args.ttft_ms / 1e3, args.itl_ms / 1e3)
    web.run_app(server.app(), host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
