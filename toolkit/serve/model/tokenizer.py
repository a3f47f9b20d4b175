"""Text to tokens and back, chat templates, and text that streams without tearing characters."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.config import cache_dir
from toolkit.errors import FormatError, UsageError, require
from toolkit.serve.model.tool_prompt import tools_in_words
from toolkit.serve.request import SamplingParams

# How many tokens of the prompt are decoded with the first token, for tokenizers whose words carry
# their leading space only after another word.
_CONTEXT = 4
_INCOMPLETE = "\ufffd"
# What is passed to the template's renderer beside a template's own settings.
_OURS = frozenset(
    {"conversation", "tools", "documents", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "padding", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {chr(256 + at): byte for at, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A model's own tokenizer and chat template. Safe to use from several threads."""

    def __init__(self, pretrained: Any) -> None:
        """Wrap a fast tokenizer of transformers."""
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read it from a GGUF file or a Hugging Face folder. Raises FormatError."""
        transformers = require("transformers", extra="serve")
        folder = path if path.is_dir() else _converted(path, transformers)
        try:
            return cls(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{path} has no tokenizer that can be read: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self._pretrained.chat_template)

    @property
    def chat_template(self) -> str:
        """The chat template's source, "" without one."""
        template = self._pretrained.chat_template
        return template if isinstance(template, str) else "\n".join((template or {}).values())

    @property
    def _knows_tools(self) -> bool:
        return "tools" in self.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with whatever the model wants at its start.

        Raises UsageError for half a surrogate pair, which JSON can carry and no text contains.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode: {error.reason} at {error.start}") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's turn.

        `tools` (OpenAI's) are described by the template; where it knows of none, by a system
        message in Hermes' words. `settings` are the template's own. Raises UsageError when the
        model has no chat template or it refuses the messages.
        """
        import jinja2

        if not self.has_chat_template:
            raise UsageError(
                "this model has no chat template", remedy="use plain completions instead"
            )
        own = dict(settings or {})
        if taken := own.keys() & _OURS:
            raise UsageError(f"{sorted(taken)[0]!r} is no setting of a chat template's own")
        conversation = [dict(message) for message in messages]
        offered = [dict(tool) for tool in tools] or None
        if not self._knows_tools:
            conversation, offered = tools_in_words(conversation, tools), None
        try:
            text = self._pretrained.apply_chat_template(
                conversation,
                tools=offered,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **own,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> IncrementalText:
        """Return what turns the tokens after `prompt_ids` into text, up to a stop string."""
        return IncrementalText(self, prompt_ids, params or SamplingParams())

    def for_xgrammar(self, vocab_size: int, stop_ids: Sequence[int]) -> Any:
        """Return the vocabulary as xgrammar reads it."""
        xgrammar = require("xgrammar", extra="structured")
        return xgrammar.TokenizerInfo.from_huggingface(
            self._pretrained, vocab_size=vocab_size, stop_token_ids=list(stop_ids)
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for, which need not be whole characters."""
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


class IncrementalText:
    """Text as tokens come: whole characters only, and nothing that may yet be a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._params = params
        self._num_pushed = 0
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._known = tokenizer.decode(self._ids)
        self._num_known = len(self._ids)
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that is certain once `token_id` has followed."""
        self._ids.append(token_id)
        self._num_pushed += 1
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        fresh = text[len(self._known) :]
        # From here on the tokens just shown are the context of the next.
        del self._ids[: self._num_known]
        self._num_known = len(self._ids)
        self._known = self._tokenizer.decode(self._ids)
        return self._release(fresh)

    def flush(self) -> str:
        """Return what was held back, half a character included; the request has ended."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._ids)[len(self._known) :]
        text = self._release(rest)
        return text if self.stopped else text + self._held

    def _release(self, fresh: str) -> str:
        """Return the held and fresh text up to a stop string, or to what may begin one."""
        text, stops = self._held + fresh, self._params.stop
        if self._num_pushed < self._params.min_tokens:
            # A stop string is not looked for yet, not even its beginning.
            stops = ()
        found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, stop = min(found)
            return text[: at + len(stop)] if self._params.include_stop else text[:at]
        keep = max((overlap(text, stop) for stop in stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`.

    >>> overlap("a line\\n", "\\n\\n"), overlap("word", "\\n")
    (1, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _converted(path: Path, transformers: Any) -> Path:
    """Return a folder with the GGUF file's tokenizer, converted once (seconds) and cached."""
    stat = path.stat()
    key = f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}:{transformers.__version__}"
    folder = cache_dir() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        pretrained = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        pretrained.save_pretrained(temporary)
        if not folder.is_dir():
            temporary.rename(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        # Another process may have finished first; then its folder is as good as ours.
        if not folder.is_dir():
            raise FormatError(f"{path} has no tokenizer that can be read: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
