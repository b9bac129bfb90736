"""Figures per token: the same samples as the client library's, under both names."""

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from router.metrics import RouterMetrics
from router.token_metrics import ITL, Series

VALUES = [0.0005, 0.001, 0.0011, 0.04, 0.2, 4.0, 5.0, 77.0]


def test_a_series_counts_as_the_client_library_does() -> None:
    registry, series = CollectorRegistry(), Series(ITL)
    theirs = Histogram("x", "help", buckets=ITL, registry=registry)
    for value in VALUES:
        theirs.observe(value)
        series.observe(value)
    ours = {(s.name, str(s.labels)): s.value for s in series.family("x", "help", {}).samples}
    (family,) = registry.collect()
    wanted = {(s.name, str(s.labels)): s.value for s in family.samples}
    del wanted["x_created", "{}"]
    assert ours == pytest.approx(wanted)


def test_tokens_are_shown_under_both_names() -> None:
    metrics = RouterMetrics()
    metrics.tokens.first(0.3, 1)
    for value in VALUES:
        metrics.tokens.next(value, 2)
    assert b"vllm:generation_tokens" not in metrics.render()
    metrics.vllm.serve("m")
    for name, labels in (
        ("tandem_router_output_tokens", {}),
        ("vllm:generation_tokens", {"model_name": "m"}),
    ):
        assert metrics.registry.get_sample_value(f"{name}_total", labels) == 17
    text = generate_latest(metrics.registry).decode()
    assert 'vllm:inter_token_latency_seconds_bucket{le="0.2",model_name="m"} 5.0' in text
    assert 'tandem_router_itl_seconds_bucket{le="+Inf"} 8.0' in text
    assert "tandem_router_ttft_seconds_count 1.0" in text
