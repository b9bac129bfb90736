"""The OpenAI API over real HTTP, with stub workers behind real links."""

import asyncio
import base64
from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletionMessageParam

from common.blockhash import pack_tokens, unpack_tokens
from common.messages import Admit, Prefill
from tests.client import Answer, complete, stream
from tests.router.conftest import Deploy
from tests.router.deployment import MODEL, Deployment, until
from tests.router.stub_worker import expected

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the tide?"}]


async def chunks(served: Deployment, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; the last one must be `[DONE]`."""
    async with served.http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [msgspec.json.decode(line.removeprefix("data: ")) for line in lines]


async def test_streaming_equals_not_streaming(deploy: Deploy) -> None:
    async with deploy() as served:
        for n in (1, 3):
            params: dict[str, Any] = {"seed": n, "n": n, "max_tokens": 40}
            whole = await complete(served.http, [9, 8, 7], **params)
            parts = await stream(served.http, [9, 8, 7], **params)
            assert parts.tokens == whole.tokens
            assert parts.text == whole.text
            assert parts.finish == whole.finish == dict.fromkeys(range(n), "length")
            assert parts.usage == whole.usage
            assert parts.done
            for choice in range(n):
                wanted = expected([9, 8, 7], 40, seed=n, choice=choice)
                assert whole.tokens[choice] == wanted
                assert whole.text[choice] == served.text_model.decode(wanted)


async def test_every_step_sends_a_chunk_also_without_text(deploy: Deploy) -> None:
    async with deploy() as served:
        wanted = expected([1, 2], 60)
        events = await chunks(
            served, "/v1/completions", prompt=[1, 2], seed=0, max_tokens=60, return_token_ids=True
        )
        tokens = [event["choices"][0]["token_ids"] for event in events]
        assert [token for part in tokens for token in part] == wanted
        assert tokens == [[token] for token in wanted]
        # Random bytes: some of them are halves of characters, held back.
        assert "" in [event["choices"][0]["text"] for event in events]
        assert events[0]["choices"][0]["prompt_token_ids"] == [1, 2]
        assert len({event["id"] for event in events}) == 1
        assert all("usage" not in event for event in events)


async def test_usage_is_there_when_asked_for(deploy: Deploy) -> None:
    async with deploy() as served:
        served.prefills[0].cached_tokens = 16
        prompt = list(range(4, 36))
        ask = {"prompt": prompt, "max_tokens": 3, "n": 2}
        details = {"prompt_tokens_details": {"cached_tokens": 16}}
        *events, last = await chunks(
            served, "/v1/completions", **ask, stream_options={"include_usage": True}
        )
        assert last["choices"] == []
        total = {"prompt_tokens": 32, "completion_tokens": 6, "total_tokens": 38, **details}
        assert last["usage"] == total
        assert all(event["usage"] is None for event in events)
        events = await chunks(
            served, "/v1/completions", **ask, stream_options={"continuous_usage_stats": True}
        )
        counts = [
            event["usage"]["completion_tokens"]
            for event in events
            if event["choices"][0]["index"] == 1
        ]
        assert counts == [1, 2, 3]
        assert all(event["choices"] for event in events)
        assert served.value("prefix_hit_tokens_total") == 32


async def test_chat_stream_has_role_first_and_one_finish_per_choice(deploy: Deploy) -> None:
    async with deploy() as served:
        body = {"messages": MESSAGES, "max_tokens": 5, "n": 2, "seed": 3, "return_token_ids": True}
        events = await chunks(served, "/v1/chat/completions", **body)
        choices = [event["choices"][0] for event in events]
        assert [choice["delta"] for choice in choices[:2]] == [
            {"role": "assistant", "content": ""}
        ] * 2
        for index in range(2):
            mine = [choice for choice in choices if choice["index"] == index]
            assert [choice["finish_reason"] for choice in mine] == [None] * 5 + ["length"]
            assert all(choice["delta"].keys() == {"content"} for choice in mine[1:])
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        whole = (await served.http.post("/v1/chat/completions", json=body)).json()
        assert whole["prompt_token_ids"] == events[0]["prompt_token_ids"]
        assert served.text_model.chat_template is not None
        prompt = served.text_model.encode_now(
            "<|begin|><|im_start|>user\nthe tide?<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        )
        assert whole["prompt_token_ids"] == prompt
        for choice in whole["choices"]:
            index = choice["index"]
            assert choice["token_ids"] == expected(prompt, 5, seed=3, choice=index)
            streamed = [c["delta"]["content"] for c in choices if c["index"] == index]
            assert choice["message"]["content"] == "".join(streamed)


async def test_a_chat_may_use_the_rest_of_the_context(deploy: Deploy) -> None:
    async with deploy(max_model_len=64) as served:
        answer = await served.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.total_tokens == 64
        # A completion stops at 16, and where the context ends.
        short = await served.openai.completions.create(model=MODEL, prompt=[5] * 60)
        assert short.usage is not None
        assert short.usage.completion_tokens == 4


async def test_64_streams_of_the_openai_client_at_once(deploy: Deploy) -> None:
    async with deploy(prefill=2, decode=2) as served:

        async def ask(i: int) -> str:
            if i % 2:
                answer = await served.openai.chat.completions.create(
                    model=MODEL, messages=MESSAGES, seed=i, max_tokens=30
                )
                return answer.choices[0].message.content or ""
            text = ""
            async for chunk in await served.openai.chat.completions.create(
                model=MODEL, messages=MESSAGES, seed=i, max_tokens=30, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            return text

        one_by_one = [await ask(i) for i in range(64)]
        assert len(set(one_by_one)) == 64
        assert list(await asyncio.gather(*(ask(i) for i in range(64)))) == one_by_one
        used = [len(worker.received(Admit)) for worker in served.decodes]
        assert sum(used) == 128 and min(used) > 20, used


async def test_prompts_in_every_form(deploy: Deploy) -> None:
    async with deploy() as served:
        encode = served.text_model.encode_now
        forms: list[tuple[Any, list[list[int]]]] = [
            ("the tide", [encode("the tide")]),
            (["the", "tide"], [encode("the"), encode("tide")]),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ]
        for given, prompts in forms:
            body = {"prompt": given, "n": 2, "max_tokens": 3, "seed": 1, "return_token_ids": True}
            data = (await served.http.post("/v1/completions", json=body)).json()
            assert [choice["index"] for choice in data["choices"]] == list(range(2 * len(prompts)))
            for i, choice in enumerate(data["choices"]):
                prompt = prompts[i // 2]
                assert choice["prompt_token_ids"] == prompt
                assert choice["token_ids"] == expected(prompt, 3, seed=1, choice=i % 2)
            assert data["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_scores_of_the_prompt_come_from_the_prefill_worker_however_late(
    deploy: Deploy,
) -> None:
    async with deploy() as served:
        prefill, decode = served.prefills[0], served.decodes[0]
        prefill.unsaid = []
        body = {"prompt": [5, 6, 7, 8], "max_tokens": 3, "n": 2, "echo": True, "logprobs": 1}
        asked = asyncio.create_task(served.http.post("/v1/completions", json=body))
        # The decode worker has written the whole answer before the first word of the other.
        await until(lambda: decode.steps >= 3 and not decode.num_running)
        prefill.speak()
        for choice in (await asked).json()["choices"]:
            logprobs = choice["logprobs"]["token_logprobs"]
            assert logprobs == [None, -0.25, -0.25, -0.25, -0.5, -0.5, -0.5]


async def test_echo_puts_the_prompt_first(deploy: Deploy) -> None:
    async with deploy() as served:
        params = {"prompt": ["the tide", "boats"], "max_tokens": 2, "seed": 1}
        plain = (await served.http.post("/v1/completions", json=params)).json()["choices"]
        echoed = (await served.http.post("/v1/completions", json={**params, "echo": True})).json()
        texts = [choice["text"] for choice in echoed["choices"]]
        assert texts == ["the tide" + plain[0]["text"], "boats" + plain[1]["text"]]
        parts = ["", ""]
        for event in await chunks(served, "/v1/completions", **params, echo=True):
            parts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert parts == texts


@pytest.mark.parametrize("streamed", [False, True])
async def test_stop_strings_end_the_work(deploy: Deploy, streamed: bool) -> None:
    async with deploy() as served:
        text = served.text_model.decode(expected([3], 200))
        stop = text[30:33]
        cut = text[: text.index(stop)]
        ask = stream if streamed else complete
        answer = await ask(served.http, [3], seed=0, max_tokens=1000, stop=["never", stop])
        assert answer.text == {0: cut}
        assert answer.finish == {0: "stop"}
        shown = await ask(
            served.http, [3], seed=0, max_tokens=1000, stop=stop, include_stop_str_in_output=True
        )
        assert shown.text == {0: cut + stop}
        await _idle(served)


async def _idle(served: Deployment) -> None:
    async with asyncio.timeout(10):
        while any(worker.num_running for worker in served.workers):
            await asyncio.sleep(0.005)


async def test_stop_token_ids_and_eos(deploy: Deploy) -> None:
    async with deploy() as served:
        tokens = expected([3], 9)
        answer = await complete(served.http, [3], seed=0, max_tokens=50, stop_token_ids=[tokens[8]])
        assert answer.ids == tokens
        assert answer.finish == {0: "stop"}
        assert answer.text == {0: served.text_model.decode(tokens[:8])}
        # The stub turns a forbidden token into the end of the sequence.
        answer = await complete(
            served.http,
            [3],
            seed=0,
            max_tokens=50,
            ignore_eos=False,
            logit_bias={str(tokens[4]): -100},
        )
        assert answer.ids == [*tokens[:4], 0]
        assert answer.finish == {0: "stop"}


async def test_logprobs(deploy: Deploy) -> None:
    async with deploy() as served:
        token_text = {i: served.text_model.decode([i]) for i in (4, 5)}
        tokens = expected([3], 3)
        answer = await served.openai.completions.create(
            model=MODEL, prompt=[3], seed=0, max_tokens=3, logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens is not None
        assert logprobs.token_logprobs == [-0.5] * 3
        assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[0] == {
            token_text[4]: -1.0,
            token_text[5]: -2.0,
            logprobs.tokens[0]: -0.5,
        }
        chat = await served.openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=20, logprobs=True, top_logprobs=1, seed=1
        )
        assert chat.choices[0].logprobs is not None
        content = chat.choices[0].logprobs.content
        assert content is not None and len(content) == 20
        assert [entry.logprob for entry in content] == [-0.5] * 20
        assert content[0].top_logprobs[0].token == token_text[4]
        # The bytes of the tokens are the bytes of the text, also of halves of characters.
        raw = b"".join(bytes(entry.bytes or []) for entry in content)
        assert raw.decode(errors="replace") == chat.choices[0].message.content
        assert tokens  # the prompt's own tokens were never asked for


async def test_one_token_is_made_by_the_prefill_worker_alone(deploy: Deploy) -> None:
    async with deploy() as served:
        answer = await complete(served.http, [3, 4], seed=0, max_tokens=1)
        assert answer.ids == expected([3, 4], 1)
        (work,) = served.prefills[0].received(Prefill)
        assert work.decode is None
        assert served.decodes[0].seen == []


async def test_decode_worker_prefills_if_there_is_no_other(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        answer = await complete(served.http, [3, 4], seed=0, max_tokens=10)
        assert answer.ids == expected([3, 4], 10)
        (work,) = served.decodes[0].received(Admit)
        assert work.prefill is None
        assert served.value("placements_total", mode="local") == 1


async def test_parameters_reach_the_workers(deploy: Deploy) -> None:
    async with deploy() as served:
        await complete(
            served.http,
            [3],
            max_tokens=9,
            min_tokens=2,
            temperature=0.5,
            top_k=7,
            top_p=0.75,
            min_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={"7": 3},
            seed=-1,
            ignore_eos=True,
            stop_token_ids=[300],
            logprobs=4,
            logprob_token_ids=[9, 5, 9],
            allowed_token_ids=[8, 7, 8],
            cache_salt="tenant",
        )
        (work,) = served.prefills[0].received(Prefill)
        assert msgspec.to_builtins(work.params) == {
            "max_tokens": 9,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.75,
            "min_p": 0.25,
            "presence_penalty": 1.0,
            "frequency_penalty": -1.0,
            "repetition_penalty": 1.5,
            "logit_bias": ((7, 3.0),),
            "seed": 2**63 - 1,
            "ignore_eos": True,
            "stop_token_ids": (300,),
            "logprobs": 4,
            "logprob_token_ids": (9, 5),
            "allowed_tokens": base64.b64encode(pack_tokens([7, 8])).decode(),
        }
        assert work.salt == "tenant"


async def test_bad_words_are_runs_of_tokens_with_and_without_a_space(deploy: Deploy) -> None:
    async with deploy() as served:
        words = ["tide", " boat"]
        await complete(served.http, [3], max_tokens=1, bad_words=words)
        (work,) = served.prefills[0].received(Prefill)
        texts = {served.text_model.decode(run) for run in work.params.bad_words}
        assert texts == {"tide", " tide", " boat"}


@pytest.mark.parametrize(("side", "kept"), [(None, [5, 6]), ("left", [5, 6]), ("right", [3, 4])])
async def test_prompts_are_cut_where_asked(
    deploy: Deploy, side: str | None, kept: list[int]
) -> None:
    async with deploy() as served:
        await complete(
            served.http, [3, 4, 5, 6], max_tokens=1, truncate_prompt_tokens=2, truncation_side=side
        )
        (work,) = served.prefills[0].received(Prefill)
        assert unpack_tokens(work.tokens) == kept


async def test_a_chat_echoes_the_message_that_it_goes_on_with(deploy: Deploy) -> None:
    async with deploy() as served:
        said = "an apple a day"
        body = {
            "messages": [*MESSAGES, {"role": "assistant", "content": said}],
            "max_tokens": 3, "continue_final_message": True, "add_generation_prompt": False,
            "n": 2, "seed": 3, "return_prompt_text": True,
        }  # fmt: skip
        plain = (await served.http.post("/v1/chat/completions", json=body)).json()
        assert plain["prompt_text"].endswith(said)
        texts = [choice["message"]["content"] for choice in plain["choices"]]
        body["echo"] = True
        whole = (await served.http.post("/v1/chat/completions", json=body)).json()
        assert [c["message"]["content"] for c in whole["choices"]] == [said + t for t in texts]
        parts = ["", ""]
        events = await chunks(served, "/v1/chat/completions", **body)
        for event in events:
            parts[event["choices"][0]["index"]] += event["choices"][0]["delta"]["content"]
        assert parts == [said + text for text in texts]
        assert events[0]["prompt_text"] == plain["prompt_text"]
        body["messages"] = MESSAGES
        body |= {"continue_final_message": False, "add_generation_prompt": True}
        other = (await served.http.post("/v1/chat/completions", json=body)).json()
        assert "tide" not in other["choices"][0]["message"]["content"]


async def test_models_version_and_debug(deploy: Deploy) -> None:
    async with deploy() as served:
        models = await served.openai.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await served.openai.models.retrieve(MODEL)).id == MODEL
        assert (await served.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 1024
        assert (await served.http.get("/ping")).status_code == 200
        assert "version" in (await served.http.get("/version")).json()
        rows = (await served.http.get("/debug/workers")).json()["workers"]
        assert {(row["id"], row["role"], row["epoch"], row["state"]) for row in rows} == {
            (worker.info.id, worker.info.role, worker.info.epoch, "ready")
            for worker in served.workers
        }
        assert all(row["costs"]["step_s"] > 0 and row["token_bytes"] > 0 for row in rows)
        report = (await served.http.get("/debug/ledger")).json()
        assert report["workers"].keys() == {"prefill-0", "decode-0"}
        assert report["total"] == {
            "num_blocks": 8192,
            "free": 8192,
            "cached": 0,
            "in_use": 0,
            "leased": 0,
            "receiving": 0,
            "draining": 0,
            "running": 0,
            "balanced": True,
        }


async def test_request_id_is_a_label(deploy: Deploy) -> None:
    async with deploy() as served:
        same = {"x-request-id": "mine-1"}
        body = {"prompt": [3], "seed": 0, "max_tokens": 20}
        first, second = await asyncio.gather(
            served.http.post("/v1/completions", json=body, headers=same),
            served.http.post("/v1/completions", json=body, headers=same),
        )
        assert first.headers["x-request-id"] == second.headers["x-request-id"] == "mine-1"
        assert first.json()["id"] != second.json()["id"]
        assert first.json()["choices"] == second.json()["choices"]
        odd = await served.http.get("/ping", headers={"x-request-id": "a b\t{}"})
        assert odd.headers["x-request-id"] != "a b\t{}"


async def test_metrics_count_what_happened(deploy: Deploy) -> None:
    async with deploy() as served:
        answers: list[Answer] = [await complete(served.http, [3] * 20) for _ in range(3)]
        assert all(len(answer.ids) == 16 for answer in answers)
        await served.http.get("/v1/nothing")
        text = (await served.http.get("/metrics")).text
        for line in (
            'tandem_router_requests_total{outcome="finished"} 3.0',
            'tandem_router_http_errors_total{status="404"} 1.0',
            'tandem_router_placements_total{mode="remote"} 3.0',
            "tandem_router_prompt_tokens_total 60.0",
            "tandem_router_output_tokens_total 48.0",
            "tandem_router_ttft_seconds_count 3.0",
            "tandem_router_itl_seconds_count 45.0",
            "tandem_router_e2e_seconds_count 3.0",
            "tandem_router_live_requests 0.0",
            'tandem_router_workers{role="decode"} 1.0',
        ):
            assert line in text.splitlines(), line


async def test_equal_prompts_of_one_call_get_texts_of_their_own(deploy: Deploy) -> None:
    async with deploy(prefill=0) as served:
        body = {"prompt": [[5] * 20] * 3, "max_tokens": 8, "return_token_ids": True}
        for seed in ({}, {"seed": 7}):
            response = await served.http.post("/v1/completions", json={**body, **seed})
            texts = {tuple(choice["token_ids"]) for choice in response.json()["choices"]}
            assert len(texts) == (1 if seed else 3)


async def test_running_requests_are_those_that_workers_report(deploy: Deploy) -> None:
    def line(text: str, name: str) -> str:
        return next(part for part in text.splitlines() if part.startswith(f"vllm:{name}{{"))

    async with deploy(prefill=0) as served:
        (worker,) = served.decodes
        worker.ends_at = 3
        asked = asyncio.create_task(complete(served.http, [3] * 20, n=2))
        await until(lambda: served.service.num_requests() == (2, 0))
        text = (await served.http.get("/metrics")).text
        assert line(text, "num_requests_running").endswith(" 2.0")
        assert line(text, "num_requests_waiting").endswith(" 0.0")
        worker.go_on()
        await asked
        await until(lambda: served.service.num_requests() == (0, 0))
