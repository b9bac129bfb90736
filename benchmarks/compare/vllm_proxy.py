"""The proxy of vLLM 1P1D: each prompt goes to the prefill server, then to the decode server.

The prefill server answers one token and where its KV blocks are; the decode server fetches them
and streams the answer. `python -m benchmarks.compare.vllm_proxy --help`.
"""

import argparse
import uuid

import aiohttp
import msgspec
from aiohttp import web

REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Proxy:
    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill, self.decode = prefill, decode

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/completions", self.complete)
        app.cleanup_ctx.append(self._session)
        return app

    async def _session(self, app: web.Application):  # type: ignore[no-untyped-def]
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.session:
            yield

    async def health(self, request: web.Request) -> web.Response:
        """200 when both servers are ready."""
        for url in (self.prefill, self.decode):
            try:
                async with self.session.get(f"{url}/health") as response:
                    if response.status != 200:
                        return web.Response(status=503)
            except aiohttp.ClientError:
                return web.Response(status=503)
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        headers = {"content-type": "application/json", "x-request-id": str(uuid.uuid4())}
        first = {name: value for name, value in body.items() if name != "stream_options"}
        first |= {"max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE_DECODE}
        async with self.session.post(
            f"{self.prefill}/v1/completions", data=msgspec.json.encode(first), headers=headers
        ) as response:
            answer = await response.read()
            if response.status != 200:
                return web.Response(status=response.status, body=answer)
        body["kv_transfer_params"] = msgspec.json.decode(answer)["kv_transfer_params"]
        async with self.session.post(
            f"{self.decode}/v1/completions", data=msgspec.json.encode(body), headers=headers
        ) as response:
            out = web.StreamResponse(status=response.status)
            out.content_type = response.content_type
            await out.prepare(request)
            async for data in response.content.iter_any():
                await out.write(data)
            await out.write_eof()
            return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare.vllm_proxy")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    args = parser.parse_args()
    app = Proxy(args.prefill, args.decode).app()
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
