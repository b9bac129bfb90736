"""Which worker the router has fetch a prefix, and from whom."""

from common.blockhash import BlockHash, chain, pack_tokens, seed
from common.messages import Admit, KvLayoutInfo, Load, Peer, Prefill
from router.fleet import FETCH_BPS, Fleet
from tests.client import complete
from tests.router.conftest import Deploy
from tests.router.deployment import Deployment, until
from tests.router.stub_worker import StubWorker, expected
from tests.worker_info import worker_info

PROMPT = [i * 7 % 300 + 4 for i in range(900)]


def hashes() -> list[BlockHash]:
    return chain(pack_tokens(PROMPT), seed("c0"))


async def publish(served: Deployment, worker: StubWorker, num_blocks: int) -> None:
    """The worker caches the first blocks of the prompt, and the router knows."""
    assert worker._registration is not None
    names = hashes()[:num_blocks]
    worker._registration.publish(names, [])
    directory = served.service._directory
    await until(lambda: directory.matches("c0", 16, names).get(worker.info.id) == num_blocks)


async def test_a_prefill_worker_is_told_to_fetch_from_a_decode_worker(deploy: Deploy) -> None:
    async with deploy() as served:
        (p,), (d,) = served.prefills, served.decodes
        await publish(served, p, 2)
        await publish(served, d, 50)
        answer = await complete(served.http, PROMPT, seed=5, max_tokens=4)
        assert answer.ids == expected(PROMPT, 4, seed=5)
        (prefill,), (admit,) = p.received(Prefill), d.received(Admit)
        assert prefill.fetch is not None and admit.fetch is None
        assert prefill.fetch.peer == Peer(d.info.id, d.info.epoch, d.info.kv_address)
        assert prefill.fetch.units == 50 and 0 < prefill.fetch.within_s < 60
        assert served.value("fetches_total") == 1


async def test_a_decode_worker_that_prefills_is_told_to_fetch(deploy: Deploy) -> None:
    async with deploy(prefill=0, decode=2) as served:
        owner, other = served.decodes
        await publish(served, owner, 50)
        # It has no seat left, and many tokens to compute first.
        busy = served.service.fleet[owner.info.id]
        busy.num_seqs.place(64)
        busy.prefill_tokens.place(100_000)
        answer = await complete(served.http, PROMPT, seed=5, max_tokens=4)
        assert answer.ids == expected(PROMPT, 4, seed=5)
        (admit,) = other.received(Admit)
        assert admit.fetch is not None and admit.fetch.peer.id == owner.info.id


async def test_nothing_is_fetched_from_a_worker_that_drains(deploy: Deploy) -> None:
    async with deploy() as served:
        await publish(served, served.decodes[0], 50)
        await served.add("decode", "decode-9")
        served.service.fleet[served.decodes[0].info.id].draining = True
        await complete(served.http, PROMPT, seed=5, max_tokens=4)
        (prefill,) = served.prefills[0].received(Prefill)
        assert prefill.fetch is None


def test_the_rate_is_what_the_worker_measured() -> None:
    fleet = Fleet()
    layout = KvLayoutInfo(
        block_size=16, num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16"
    )
    fleet.up(worker_info("p", role="prefill", layout=layout))
    member = fleet["p"]
    assert member.candidate(0.0).fetch_s == 1024 / FETCH_BPS
    member.report(Load(fetch_bps=2e6))
    assert member.candidate(0.0).fetch_s == 1024 / 2e6
