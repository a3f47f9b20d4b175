"""Prometheus metrics under vLLM's names, so that dashboards made for it work here."""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from toolkit.serve.engine import Engine, Output, StepReport
from toolkit.serve.request import FinishReason
from toolkit.serve.scheduler import Scheduler
from toolkit.serve.server.split_view import SplitMetrics
from toolkit.serve.split.engine import DividedEngine

# vLLM's bucket bounds, in seconds and in tokens.
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)


class Metrics:
    """The numbers of one engine. Updated from one thread."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._scheduler = engine.scheduler
        self._model_name = model_name
        self._seen = (0, 0, 0)
        self._finished_seen = dict.fromkeys(FinishReason, 0)
        gauges: tuple[tuple[str, str, Callable[[Scheduler], float]], ...] = (
            ("num_requests_running", "Requests holding KV blocks.", lambda s: s.num_running),
            ("num_requests_waiting", "Requests queued.", lambda s: s.queue.num_requests),
            ("kv_cache_usage_perc", "Used KV blocks, 1 is all.", lambda s: s.pool.usage),
        )
        for name, text, read in gauges:
            self._gauge(name, text).set_function(functools.partial(self._read, read))
        self.restarts = self._counter("engine_restarts", "Engines replaced.", "toolkit")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Requests whose blocks were taken.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hit = self._counter("prefix_cache_hits", "Prompt tokens found cached.")
        self._success = Counter(
            "vllm:request_success",
            "Requests ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._answers = Counter(
            "toolkit:http_responses",
            "HTTP answers, by status.",
            ["model_name", "status"],
            registry=self._registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to token 1.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens.", _TOKEN_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean time a token.", _TOKEN_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to start.", _REQUEST_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "To token 1.", _REQUEST_S)
        self._decode = self._histogram("request_decode_time_seconds", "Token 1 to end.", _REQUEST_S)
        self._inference = self._histogram("request_inference_time_seconds", "To end.", _REQUEST_S)
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKENS
        )
        self._in_tokens = self._histogram("request_prompt_tokens", "Prompt length.", _TOKENS)
        self._out_tokens = self._histogram("request_generation_tokens", "Output length.", _TOKENS)
        self._split: SplitMetrics | None = None
        if isinstance(engine, DividedEngine):
            self._split = SplitMetrics(engine, model_name, self._registry)

    def _read(self, read: Callable[[Scheduler], float]) -> float:
        return read(self._scheduler)

    def follow(self, engine: Engine) -> None:
        """Read from another engine from here on; counts go on from where they are."""
        self._carry()
        if self._split is not None and isinstance(engine, DividedEngine):
            self._split.follow(engine)
        self._scheduler = engine.scheduler
        self._seen = (0, 0, 0)
        self._finished_seen = dict.fromkeys(FinishReason, 0)

    def answered(self, status: int) -> None:
        """Count an HTTP answer: what was refused never reaches the engine's own counts."""
        self._answers.labels(self._model_name, str(status)).inc()

    def step(self, report: StepReport) -> None:
        """Count one step of the engine."""
        if self._split is not None:
            self._split.step(report)
        self._step_tokens.observe(report.num_tokens)
        self._generation_tokens.inc(len(report.outputs))
        for output in report.outputs:
            self._token(output, report.end_s)

    def render(self) -> bytes:
        """Return the text Prometheus scrapes."""
        self._carry()
        return generate_latest(self._registry)

    def _carry(self) -> None:
        """Carry over by difference what the scheduler counts itself."""
        tables = self._scheduler.tables
        now = (self._scheduler.num_preemptions, tables.num_queried, tables.num_hit)
        for counter, count, seen in zip(
            (self._preemptions, self._queried, self._hit), now, self._seen, strict=True
        ):
            counter.inc(count - seen)
        self._seen = now
        for reason, count in self._scheduler.num_finished.items():
            ended = self._success.labels(self._model_name, reason.value)
            ended.inc(count - self._finished_seen[reason])
            self._finished_seen[reason] = count

    def _token(self, output: Output, now: float) -> None:
        request = output.request
        if output.index == 0:
            self._prompt_tokens.inc(len(request.prompt_ids))
            self._ttft.observe(output.gap_s)
        else:
            self._itl.observe(output.gap_s)
        if output.finish_reason is None:
            return
        first_s, started_s = request.first_token_s, request.scheduled_s
        assert first_s is not None
        assert started_s is not None
        num_output = len(request.output_ids)
        self._e2e.observe(now - request.arrival_s)
        self._queue.observe(started_s - request.arrival_s)
        self._prefill.observe(first_s - started_s)
        self._decode.observe(now - first_s)
        self._inference.observe(now - started_s)
        if num_output > 1:
            self._tpot.observe((now - first_s) / (num_output - 1))
        self._in_tokens.observe(len(request.prompt_ids))
        self._out_tokens.observe(num_output)

    def _counter(self, name: str, text: str, prefix: str = "vllm") -> Counter:
        made = Counter(f"{prefix}:{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        made = Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry)
        return made.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
        )
        return made.labels(self._model_name)
