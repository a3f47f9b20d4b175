"""Other people's clients and checkers against the server, from an environment of their own.

python -m venv PEERS
PEERS/bin/pip install schemathesis litellm 'lm-eval[api]' transformers guidellm
TOOLKIT_PEERS=PEERS python -m pytest tests/serve/test_peers.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.serve.model.tokenizer import Tokenizer

pytestmark = [pytest.mark.peer, pytest.mark.slow]
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,unsupported_method"
)


def tool(name: str) -> Path:
    """Return a peer's command, or skip saying how to get it."""
    found = Path(os.environ.get("TOOLKIT_PEERS", "/nonexistent")) / "bin" / name
    if not found.exists():
        pytest.skip(f"no {name}: set TOOLKIT_PEERS to an environment that has it (see above)")
    return found


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def tokenizer_folder(gguf: Path, parent: Path) -> Path:
    folder = parent / "tokenizer"
    Tokenizer.load(gguf)._pretrained.save_pretrained(folder)
    return folder


def test_schemathesis_finds_no_fault(start: Callable[..., Any], tmp_path: Path) -> None:
    served = start(max_context=96, max_batch=8)
    run(
        tool("schemathesis"), "run", f"{served.url}/openapi.json", "--checks", CHECKS,
        "--max-examples", "25", "--generation-deterministic", "--request-timeout", "60",
        "--phases", "examples,coverage,fuzzing", "--max-time", "120", "--no-color",
        cwd=tmp_path,
    )  # fmt: skip
    served.until(lambda: not served.service.engine.has_work)
    served.service.engine.scheduler.check_integrity()
    assert served.metric("toolkit:engine_restarts_total") == 0


LITELLM = """
import json, sys, litellm
base = sys.argv[1]
litellm.suppress_debug_info = True
ask = dict(model="openai/tiny", api_base=base, messages=[{"role": "user", "content": "Hi"}],
           max_tokens=6, temperature=0)
whole = litellm.completion(**ask)
parts = litellm.completion(**ask, stream=True)
text = "".join(part.choices[0].delta.content or "" for part in parts)
tool = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}}
named = {"type": "function", "function": {"name": "f"}}
call = litellm.completion(**ask | {"max_tokens": 60}, tools=[tool], tool_choice=named)
vector = litellm.embedding(model="openai/tiny", api_base=base, input=["a b"])
plain = litellm.text_completion(
    model="text-completion-openai/tiny", api_base=base, prompt="a", max_tokens=3)
try:
    litellm.completion(**ask | {"model": "openai/other"})
    error = None
except litellm.NotFoundError as found:
    error = type(found).__name__
print(json.dumps({"whole": whole.choices[0].message.content, "streamed": text,
    "usage": whole.usage.completion_tokens, "plain": plain.usage.completion_tokens,
    "call": call.choices[0].message.tool_calls[0].function.arguments,
    "vector": len(vector.data[0]["embedding"]), "error": error}))
"""


def test_litellm_reads_every_answer(served: Any, tmp_path: Path) -> None:
    out = run(tool("litellm").with_name("python"), "-c", LITELLM, f"{served.url}/v1", cwd=tmp_path)
    told = json.loads(out.splitlines()[-1])
    assert told["whole"] == told["streamed"]
    assert json.loads(told["call"])["x"] in (1, 2)
    assert (told["usage"], told["plain"], told["vector"]) == (6, 3, 32)
    assert told["error"] == "NotFoundError"


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b c d"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def test_lm_eval_scores_as_we_do(served: Any, tmp_path: Path, smollm2_gguf: Path) -> None:
    """Log-likelihoods through `echo` and `logprobs`: lm-eval's choices are those of our scores."""
    command, folder = tool("lm_eval"), tokenizer_folder(smollm2_gguf, tmp_path)
    data = tmp_path / "data.jsonl"
    questions = [f"The letter number {at} is" for at in range(6)]
    data.write_text("".join(json.dumps({"question": each}) + "\n" for each in questions))
    (tmp_path / "letters.yaml").write_text(TASK.replace("DATA", str(data)))
    settings = f"model=tiny,base_url={served.url}/v1/completions,tokenizer={folder}"
    run(
        command, "--model", "local-completions", "--model_args", settings, "--tasks", "letters",
        "--include_path", tmp_path, "--log_samples", "--output_path", tmp_path / "out",
        cwd=tmp_path,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    for row in map(json.loads, samples.read_text().splitlines()):
        for choice, (logprob, greedy) in zip((" a", " b c d"), row["filtered_resps"], strict=True):
            question = row["doc"]["question"]
            found = served.ask(prompt=question + choice, max_tokens=0, echo=True, logprobs=1)
            scores = found.choices[0].logprobs
            first = len(served.service.tokenizer.encode(question))
            assert float(logprob) == pytest.approx(sum(scores.token_logprobs[first:]), abs=1e-3)
            tops = [max(top.values()) for top in scores.top_logprobs[first:]]
            assert (greedy in (True, "True")) == (tops == scores.token_logprobs[first:])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_counts_what_was_served(
    served: Any, tmp_path: Path, smollm2_gguf: Path, path: str
) -> None:
    """24 requests at 8 a second, chats of two turns: none fails, and it counts tokens as we do."""
    command, folder = tool("guidellm"), tokenizer_folder(smollm2_gguf, tmp_path)
    turns = 2 if "chat" in path else 1
    told = tmp_path / "told.json"
    run(
        command, "run", "--disable-console",
        "--backend", f"kind=openai_http,target={served.url},model=tiny,request_format={path}",
        "--profile", "kind=poisson,rate=8", "--constraint", "kind=max_requests,count=24",
        "--tokenizer", f"kind=huggingface_auto,model={folder}",
        "--data", f"kind=synthetic_text,prompt_tokens=40,output_tokens=8,turns={turns}",
        "--output", f"kind=json,path={told}",
        cwd=tmp_path,
    )  # fmt: skip
    (benchmark,) = json.loads(told.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (24, 0, 0)
    drawn = sum(
        each["output_metrics"]["text_tokens"] for each in benchmark["requests"]["successful"]
    )
    assert drawn == 24 * 8
