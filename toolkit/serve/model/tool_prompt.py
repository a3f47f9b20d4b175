"""Tools told in words, as Hermes models learn them, where the chat template knows of none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_RULE = (
    "You may call these functions, given as JSON schemas within <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, answer with a JSON object of its name and arguments within "
    '<tool_call></tool_call>, for example:\n<tool_call>\n{{"name": "f", "arguments": '
    '{{"x": 1}}}}\n</tool_call>'
)


def tools_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the conversation with tools, calls and answers written out as plain turns.

    >>> tools_in_words([{"role": "tool", "content": "4", "tool_call_id": "1"}], [])
    [{'role': 'user', 'content': '<tool_response>\\n4\\n</tool_response>'}]
    """
    turns = [_in_words(message) for message in messages]
    if tools:
        rule = _RULE.format(tools="\n".join(json.dumps(tool) for tool in tools))
        if turns and turns[0]["role"] == "system":
            turns[0] = turns[0] | {"content": f"{turns[0]['content']}\n\n{rule}"}
        else:
            turns.insert(0, {"role": "system", "content": rule})
    return turns


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        answer = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": answer}
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    said = [message["content"]] if message.get("content") else []
    return {"role": message["role"], "content": "\n".join([*said, *calls])}
