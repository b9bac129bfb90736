"""A minimal OpenAI-compatible server around transformers: the baseline that everybody has.

Requests that wait are padded into one batch, prefilled and decoded together, greedily, until all
of them have their tokens; those that come meanwhile wait. Every step's tokens are streamed.
`python -m benchmarks.compare.transformers_server CHECKPOINT --port 8000`.
"""

import argparse
import asyncio
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, DynamicCache


@dataclass(slots=True)
class Job:
    """A request between the server's loop and the model's thread."""

    prompt: list[int]
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[int]
    """Token ids as they are made."""

    def put(self, token: int) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, token)


class Batcher(threading.Thread):
    """Owns the model: takes what waits, at most `max_batch` jobs, and finishes it."""

    def __init__(
        self, directory: Path, max_batch: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(daemon=True)
        self.max_batch = max_batch
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        # In evaluation mode, as `from_pretrained` leaves it.
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)

    def run(self) -> None:
        while True:
            batch = [self.jobs.get()]
            while len(batch) < self.max_batch:
                try:
                    batch.append(self.jobs.get_nowait())
                except queue.Empty:
                    break
            self.generate(batch)

    @torch.inference_mode()
    def generate(self, batch: list[Job]) -> None:
        """Greedy decoding, prompts padded on the left."""
        longest = max(len(job.prompt) for job in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # [jobs, tokens]
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, longest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, longest - len(job.prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        for step in range(max(job.max_tokens for job in batch)):
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)  # [jobs, 1]
            for job, token in zip(batch, ids[:, 0].tolist(), strict=True):
                if step < job.max_tokens:
                    job.put(token)
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
            positions = positions[:, -1:] + 1


class Server:
    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A stream of token ids; the text of an answer is left out."""
        body = msgspec.json.decode(await request.read())
        job = Job(body["prompt"], body["max_tokens"], asyncio.get_running_loop(), asyncio.Queue())
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        self.batcher.jobs.put(job)
        for _ in range(job.max_tokens):
            choice = {"index": 0, "text": "", "token_ids": [await job.out.get()]}
            await response.write(_event(msgspec.json.encode({"choices": [choice]})))
        usage = {"prompt_tokens": len(job.prompt), "completion_tokens": job.max_tokens}
        await response.write(_event(msgspec.json.encode({"choices": [], "usage": usage})))
        await response.write(_event(b"[DONE]"))
        await response.write_eof()
        return response


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare.transformers_server")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: what torch takes by itself")
    parser.add_argument("--max-batch", type=int, default=64)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batcher = Batcher(args.checkpoint, args.max_batch)
    batcher.start()
    web.run_app(Server(batcher).app(), host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
