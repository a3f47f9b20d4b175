"""What clients may ask beside text: penalties, scores, embeddings, tokens, forms, tools."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from toolkit.serve.model.tokenizer import Tokenizer

MODEL = "tiny"
USER = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def chat(served: Any, **options: Any) -> Any:
    given = {"model": MODEL, "messages": USER, "max_tokens": 8, "temperature": 0.0}
    return served.client.chat.completions.create(**(given | options))


def test_penalties_and_bias_change_what_is_said(served: Any, tokenizer: Tokenizer) -> None:
    word = tokenizer.encode(" word")[0]
    told = served.ask(max_tokens=3, logit_bias={str(word): 100}).choices[0].text
    assert told == " word word word"
    varied = served.ask(
        max_tokens=3, logit_bias={str(word): 40}, frequency_penalty=2.0, presence_penalty=2.0
    )
    assert varied.choices[0].text.startswith(" word")
    again = served.ask(max_tokens=12, extra_body={"repetition_penalty": 1.5})
    assert again.choices[0].text != served.ask(max_tokens=12).choices[0].text


def test_scores_of_a_completion(served: Any, tokenizer: Tokenizer) -> None:
    plain = served.ask(max_tokens=4, logprobs=2).choices[0]
    scores = plain.logprobs
    assert "".join(scores.tokens) == plain.text
    assert len(scores.token_logprobs) == 4
    for token, logprob, top in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True
    ):
        # Greedy: the token chosen is the likeliest.
        assert logprob == max(top.values()) == top[token] < 0
        assert 2 <= len(top) <= 3
    assert scores.text_offset == [
        sum(map(len, scores.tokens[:at])) for at in range(len(scores.tokens))
    ]
    stream = served.ask(max_tokens=4, logprobs=2, stream=True)
    parts = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
    assert [p for part in parts for p in part.token_logprobs] == scores.token_logprobs
    assert [o for part in parts for o in part.text_offset] == scores.text_offset


def test_scores_of_a_prompt_are_those_of_generating_it(served: Any, tokenizer: Tokenizer) -> None:
    # As lm-eval asks: the prompt echoed with its scores, and one token more.
    ids = tokenizer.encode("Once upon a time, in a small village by the sea, there was")
    found = served.ask(prompt=ids, max_tokens=1, echo=True, logprobs=1).choices[0]
    scores = found.logprobs
    assert len(scores.tokens) == len(ids) + 1
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    assert found.text.startswith("Once upon a time")
    for at in (1, 5, len(ids) - 1):
        alone = served.ask(
            prompt=ids[:at], max_tokens=1, logprobs=1, logit_bias={str(ids[at]): 100}
        )
        (wanted,) = alone.choices[0].logprobs.token_logprobs
        assert scores.token_logprobs[at] == pytest.approx(wanted, abs=1e-3)
    nothing = served.ask(prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert nothing.choices[0].logprobs.token_logprobs == scores.token_logprobs[:-1]
    assert nothing.usage.completion_tokens == 0


def test_scores_of_a_prompt_survive_chunks_and_preemption(start: Callable[..., Any]) -> None:
    prompt = "The sea is wide and the sky is high above the hills of the old country. " * 2
    given = {"prompt": [prompt, "Short", prompt + "x"], "max_tokens": 20, "logprobs": 0}
    given |= {"echo": True, "extra_body": {"ignore_eos": True}}
    wide = start().ask(**given)
    # Two and a half of these do not fit at once.
    tight = start(step_tokens=9, max_batch=4, block_size=4, kv_bytes=72 * 256, max_context=72)
    narrow = tight.ask(**given)
    assert tight.service.engine.scheduler.num_preemptions > 0
    for ours, theirs in zip(narrow.choices, wide.choices, strict=True):
        assert ours.text == theirs.text
        assert ours.logprobs.token_logprobs[1:] == pytest.approx(
            theirs.logprobs.token_logprobs[1:], abs=1e-3
        )


def test_scores_of_a_chat(served: Any) -> None:
    choice = chat(served, logprobs=True, top_logprobs=3, max_tokens=4).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 4
    assert bytes(b for entry in entries for b in entry.bytes).decode(errors="replace") == (
        choice.message.content
    )
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert chat(served).choices[0].logprobs is None


def test_stop_ids_and_least_length(served: Any, tokenizer: Tokenizer) -> None:
    word = tokenizer.encode(" word")[0]
    bias = {"logit_bias": {str(word): 100}}
    stopped = served.ask(**bias, extra_body={"stop_token_ids": [word]})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    longer = served.ask(**bias, extra_body={"stop_token_ids": [word], "min_tokens": 4})
    assert longer.usage.completion_tokens == 5
    assert " word" not in longer.choices[0].text
    kept = served.ask(**bias, stop=" word word", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == " word word"


def test_cached_tokens_are_told(served: Any) -> None:
    prompt = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3
    assert served.ask(prompt=prompt).usage.prompt_tokens_details.cached_tokens == 0
    again = served.ask(prompt=prompt, n=2, temperature=1.0)
    assert again.usage.prompt_tokens_details.cached_tokens >= 48
    salted = served.ask(prompt=prompt, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_embeddings(served: Any) -> None:
    texts = ["The cat sat on the mat.", "A dog lay on the rug.", "x " * 600]
    both = [
        [row.embedding for row in served.client.embeddings.create(model=MODEL, input=texts, **kind)
         .data]
        for kind in ({}, {"encoding_format": "float"})
    ]  # fmt: skip
    for vectors in both:
        assert [len(vector) for vector in vectors] == [32] * 3
        assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * 3, abs=1e-5)
    for encoded, plain in zip(*both, strict=True):
        assert encoded == pytest.approx(plain, abs=1e-5)
    alone = served.client.embeddings.create(model=MODEL, input=texts[1])
    assert alone.data[0].embedding == pytest.approx(both[0][1], abs=1e-5)
    assert alone.usage.total_tokens == alone.usage.prompt_tokens > 0
    with pytest.raises(openai.BadRequestError, match="32"):
        served.client.embeddings.create(model=MODEL, input="a", dimensions=8)


def test_tokens_there_and_back(served: Any, tokenizer: Tokenizer) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(f"{served.url}{path}", json=body).raise_for_status().json()

    told = post("/tokenize", prompt="Hello there", return_token_strs=True)
    assert told["tokens"] == tokenizer.encode("Hello there")
    assert "".join(told["token_strs"]) == "Hello there"
    assert told["count"] == len(told["tokens"])
    assert post("/tokenize", messages=USER)["tokens"] == tokenizer.chat(USER)
    assert post("/detokenize", tokens=told["tokens"]) == {"prompt": "Hello there"}
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": [-1]}).status_code == 400


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"guided_regex": r"[ab]{3}-\d{2}"}, r"[ab]{3}-\d{2}"),
        ({"structured_outputs": {"regex": "x{4}"}}, "x{4}"),
        ({"guided_choice": ["yes.", "no (really)"]}, r"yes\.|no \(really\)"),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, "b*a"),
        ({"response_format": {"type": "regex", "regex": "[0-9]{2}"}}, "[0-9]{2}"),
    ],
)
def test_text_of_a_form(served: Any, options: dict[str, Any], pattern: str) -> None:
    for temperature in (0.0, 1.5):
        found = served.ask(
            max_tokens=40, temperature=temperature, seed=3, extra_body={"top_k": 50} | options
        )
        choice = found.choices[0]
        if choice.finish_reason == "stop":
            assert re.fullmatch(pattern, choice.text), choice.text
        else:
            assert "root" in str(options), choice.text


def test_json_of_a_schema(served: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = chat(served, response_format=wanted, n=2, temperature=1.0, seed=1, max_tokens=200)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
    stream = chat(served, response_format=wanted, stream=True, max_tokens=200)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert set(json.loads(text)) == {"name", "age"}
    loose = chat(served, response_format={"type": "json_object"}, max_tokens=60)
    assert loose.choices[0].message.content.startswith("{")


def test_a_form_holds_after_preemption(start: Callable[..., Any]) -> None:
    served = start(step_tokens=12, max_batch=4, block_size=4, kv_bytes=72 * 256, max_context=72)
    prompts = [f"Number {at} of the requests that come together now" for at in range(4)]
    found = served.ask(
        prompt=prompts, max_tokens=30, extra_body={"guided_regex": "(ab|cd){20}"}, temperature=1.0
    )
    assert served.service.engine.scheduler.num_preemptions > 0
    for choice in found.choices:
        assert re.fullmatch("(ab|cd)*[ac]?", choice.text), choice.text


def test_a_forced_call_has_its_arguments(served: Any) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    options = {"tools": [WEATHER, CLOCK], "tool_choice": named, "max_tokens": 200}
    found = chat(served, **options).choices[0]
    (call,) = found.message.tool_calls
    assert (call.function.name, found.message.content) == ("weather", None)
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    pieces = [
        piece
        for chunk in chat(served, **options, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or ()
    ]
    assert pieces[0].function.name == "weather"
    assert pieces[0].id
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert len(pieces) > 1


def test_a_required_call_is_one_of_the_tools(served: Any) -> None:
    options = {
        "tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False,
        "max_tokens": 300,
    }  # fmt: skip
    found = chat(served, **options).choices[0]
    (call,) = found.message.tool_calls
    assert call.function.name in ("weather", "clock")
    json.loads(call.function.arguments)
    assert found.finish_reason == "tool_calls"
    chunks = [chunk.choices[0] for chunk in chat(served, **options, stream=True)]
    assert [each.delta.tool_calls[0].function.name for each in chunks if each.delta.tool_calls] == [
        call.function.name
    ]
    assert chunks[-1].finish_reason == "tool_calls"


def test_tools_reach_the_prompt_and_answers_come_back(served: Any, tokenizer: Tokenizer) -> None:
    without = chat(served).usage.prompt_tokens
    assert chat(served, tools=[WEATHER]).usage.prompt_tokens > without + 40
    assert chat(served, tools=[WEATHER], tool_choice="none").usage.prompt_tokens == without
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    ids = httpx.post(f"{served.url}/tokenize", json={"messages": turns, "tools": [CLOCK]})
    text = tokenizer.decode(ids.json()["tokens"])
    assert "noon" in text
    assert '"clock"' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [WEATHER, WEATHER]}, "two tools have the same name"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "no tool is named 'x'",
        ),
        ({"top_logprobs": 3}, "needs logprobs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "content of type 'image_url' is not supported, only text",
        ),
        ({"response_format": {"type": "json_schema"}}, "needs its schema"),
    ],
)
def test_bad_chats_are_refused(served: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(served, **options)
