"""`toolkit serve generate`: one answer, in this process."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from toolkit.cli import view
from toolkit.cli.serve.options import (
    Device,
    Dtype,
    KvMemory,
    Model,
    Plan,
    Quantize,
    Threads,
    settings,
)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the question.")],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Makes drawn tokens repeatable.")] = 0,
    kv_memory: KvMemory = None,
    threads: Threads = None,
    quantize: Quantize = "none",
    device: Device = "cpu",
    dtype: Dtype = "auto",
    plan: Plan = None,
    as_json: view.Json = False,
) -> None:
    """Generate once in this process, without a server.

    Example: toolkit serve generate smollm2-135m "What is gravity?" --chat
    """
    chosen = settings(
        threads=threads,
        kv_memory=kv_memory,
        max_batch=1,
        quantize=quantize,
        device=device,
        dtype=dtype,
        plan=plan,
    )
    from toolkit.serve.llm import LLM
    from toolkit.serve.request import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with view.progress(quiet=as_json) as bar:
        bar.add_task(f"loading {model}", total=None)
        llm = LLM(model, chosen)

    def show(_: int, text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    if chat:
        found = llm.chat([{"role": "user", "content": prompt}], params, on_text=show)
    else:
        found = llm.generate(prompt, params, on_text=show)[0]
    usage = {"prompt_tokens": len(found.prompt_token_ids), "output_tokens": len(found.token_ids)}
    body = {
        "model": model,
        "text": found.text,
        "finish_reason": found.finish_reason,
        **usage,
        "latency_s": found.latency_s,
        "source": "measured",
    }
    view.emit(body, as_json=as_json, render=lambda: "")
