"""The offline interface on the real model, and the command line end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from toolkit.cli import serve as cli
from toolkit.errors import InfeasibleError, ToolkitError, UsageError
from toolkit.hardware.affinity import thread_environment
from toolkit.serve import LLM, EngineSettings, SamplingParams, Structured

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    made = LLM(smollm2_gguf, EngineSettings(kv_bytes=2**27, threads=1))
    yield made
    made.engine.scheduler.check_integrity()
    assert made.engine.scheduler.pool.num_used == 0
    made.close()


def test_chat_streams_what_it_returns(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    heard: list[str] = []
    found = llm.chat(QUESTION, params, on_text=lambda _, text: heard.append(text))
    assert "Paris" in found.text
    assert "".join(heard) == found.text == "".join(llm.stream(QUESTION, params))
    assert llm.timeline().on("decode", "measured")


def test_a_stream_left_early_frees_the_engine(llm: LLM) -> None:
    stream = llm.stream(QUESTION, SamplingParams(max_tokens=500))
    next(stream)
    with pytest.raises(ToolkitError, match="middle of a stream"):
        llm.generate("Hello")
    stream.close()
    assert not llm.engine.has_work
    assert llm.generate("Hello", SamplingParams(max_tokens=2))[0].token_ids


def test_an_interrupted_step_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=3)
    expected = llm.generate("Hello", params)[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Hello", params)
    llm.engine.scheduler.check_integrity()
    assert llm.generate("Hello", params)[0].token_ids == expected


def _interrupt(_: Any) -> None:
    raise KeyboardInterrupt


def test_prompts_of_every_form(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3)
    ids = llm.tokenizer.encode("Once upon a time")
    by_text, by_ids = llm.generate(["Once upon a time", ids], params)
    assert by_text.token_ids == by_ids.token_ids == llm.generate(ids, params)[0].token_ids
    assert llm.generate([], params) == []
    with pytest.raises(UsageError, match="empty"):
        llm.generate(["fine", ""], params)
    assert not llm.engine.has_work


def test_scores_and_forms(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=0)
    found = llm.generate("The capital of France is", params)[0]
    assert [score.token_id for score in found.scores] == list(found.token_ids)
    assert all(score.rank == 1 and score.top[0][1] == score.logprob for score in found.scores)
    assert [score.token_id for score in found.prompt_scores] == list(found.prompt_token_ids[1:])
    form = SamplingParams(
        max_tokens=20, structured=Structured("regex", "(Paris|Rome), in [A-Z][a-z]{4,6}")
    )
    assert llm.chat(QUESTION, form).text == "Paris, in France"


def test_a_seed_repeats_itself_among_other_requests(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=4)
    alone = llm.generate("My favourite colour is", params)[0]
    crowd = llm.generate(["The sea", "My favourite colour is", "Numbers:"], params)
    assert crowd[1].token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "sfp"}, "did you mean 'spf'"),
        ({"quantize": "int5"}, "did you mean 'int8' or 'int4'"),
        ({"block_size": 0}, "0 tokens in a KV block are none"),
        ({"kv_bytes": 0}, "0 bytes of KV cache"),
        ({"max_context": -1}, "-1 tokens of context"),
        ({"max_batch": 0}, "a batch of 0 requests"),
        ({"step_tokens": 32}, "32 tokens a step leave nothing for prefill"),
        ({"max_queue": 0}, "a queue of 0 requests lets nobody in"),
        ({"max_queue_tokens": -5}, "a queue of -5 tokens"),
    ],
)
def test_settings_that_no_model_runs_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineSettings(**options)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (EngineSettings(kv_bytes=1000), InfeasibleError, "holds no block"),
        (EngineSettings(kv_bytes=2**22, max_context=4096), InfeasibleError, "fewer than the"),
        (EngineSettings(max_context=9000), UsageError, "made for 8192"),
    ],
)
def test_settings_that_cannot_be_had(
    smollm2_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    llm: LLM,
    settings: EngineSettings,
    error: type[ToolkitError],
    message: str,
) -> None:
    # Shape only: reading the weights again would add nothing.
    from toolkit.serve import assemble
    from toolkit.serve.model.loaded import LoadedModel

    config = llm.engine.executor.decoder.config  # type: ignore[attr-defined]
    with pytest.raises(error, match=message):
        assemble.build(LoadedModel(config, {}, frozenset()), settings)


def test_serve_run_answers_and_drains(llm: LLM) -> None:
    command = [sys.executable, "-m", "toolkit", "serve", "run", "smollm2-135m", "--port", "0"]
    command += ["--threads", "1", "--kv-memory", "128MiB", "--json"]
    environment = {**os.environ, **thread_environment(1)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["threads"] == 1
            assert len(ready["pinned_cpus"]) == 1
            assert ready["kv_tokens"] == ready["kv_blocks"] * ready["block_size"]
            client = openai.OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0)
            found = client.chat.completions.create(
                model=ready["model"], messages=QUESTION, max_tokens=12, temperature=0
            )
            expected = llm.chat(QUESTION, SamplingParams(max_tokens=12))
            assert found.choices[0].message.content == expected.text
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM)


def test_serve_generate(smollm2_gguf: Path) -> None:
    options = ["--max-tokens", "4", "--threads", "1", "--kv-memory", "64MiB", "--json"]
    done = CliRunner().invoke(
        cli.app, ["generate", str(smollm2_gguf), "The capital of France is", *options]
    )
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["text"].startswith(" Paris")
    assert (body["output_tokens"], body["source"]) == (4, "measured")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2-135n"], "did you mean 'smollm2-135m'"),
        (["./absent.gguf"], "no such file"),
        (["smollm2-135m", "--threads", "9999"], "cores are usable"),
        (["smollm2-135m", "--kv-memory", "lots"], "not a size in bytes"),
        (["smollm2-135m", "--port", "70000"], "not a port number"),
    ],
)
def test_serve_run_refuses(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["run", "--port", "0", *arguments])
    assert isinstance(done.exception, ToolkitError)
    assert message in str(done.exception)


def test_help_is_instant() -> None:
    code = (
        "import sys; from toolkit.cli.main import load; load('serve'); "
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
