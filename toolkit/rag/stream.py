"""What of a streamed answer is shown: no invented citation numbers, nothing said twice."""

from __future__ import annotations

import re

from toolkit.rag.citations import MARKER, sentences

_WORD_END = re.compile(r"[\w)\]]")
_NUMBERS = re.compile(r"\d+")
_PARTIAL = re.compile(r" *(?:\[[\d,; ]*)?")


class MarkerFilter:
    """Passes streamed text on, without the citation markers that no passage answers to.

    A marker is held back until it is complete. Inside `code` brackets are code. A number right
    after a word, as in `items[7]`, that no passage has, is taken for code as well and stays.

    >>> markers = MarkerFilter(num_passages=2)
    >>> markers.feed("It closes the file [") + markers.feed("1, 7] [9]. Done") + markers.end()
    'It closes the file [1]. Done'
    >>> markers.written
    [(1, 19)]
    """

    _LONGEST = 24

    def __init__(self, num_passages: int) -> None:
        self.written: list[tuple[int, int]] = []  # (number, position in the text passed on)
        self._num_passages = num_passages
        self._held = ""
        self._in_code = False
        self._passed = 0
        self._last = ""

    def feed(self, text: str) -> str:
        """Return what of the text so far can be shown."""
        return "".join(self._step(character) for character in text)

    def end(self) -> str:
        """Return what was held back when the stream ended inside a marker."""
        return self._pass(self._flush())

    def _step(self, character: str) -> str:
        if character == "`":
            self._in_code = not self._in_code
        held = self._held + character
        if not self._in_code and len(held) < self._LONGEST and _PARTIAL.fullmatch(held):
            self._held = held
            return ""
        if MARKER.fullmatch(held.lstrip(" ")):
            self._held = ""
            return self._marker(held)
        # No marker after all; the character itself may begin one.
        out = self._pass(self._flush())
        if not self._in_code and _PARTIAL.fullmatch(character):
            self._held = character
            return out
        return out + self._pass(character)

    def _marker(self, held: str) -> str:
        found = [int(number) for number in _NUMBERS.findall(held)]
        known = list(dict.fromkeys(n for n in found if 1 <= n <= self._num_passages))
        if not known:
            after_word = held.startswith("[") and bool(_WORD_END.match(self._last))
            return self._pass(held if after_word else "")
        space = held[: held.index("[")]
        self.written += [(number, self._passed + len(space)) for number in known]
        shown = self._pass(f"{space}[{', '.join(map(str, known))}]")
        self._last = ""  # what follows a marker is not an index into it
        return shown

    def _flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _pass(self, text: str) -> str:
        self._passed += len(text)
        self._last = text[-1:] or self._last
        return text


class RepeatFilter:
    """Passes streamed text on until a sentence comes a second time; `repeated` then says so.

    Small models under greedy decoding fall into loops. Text that has so far been said before, word
    for word, is held back; it is passed on as soon as it differs. Sentences of fewer than four
    words may come again.

    >>> repeats = RepeatFilter()
    >>> repeats.feed("It closes the open file. It closes the") + repeats.feed(" open file. It")
    'It closes the open file.'
    >>> repeats.repeated
    True
    """

    def __init__(self) -> None:
        self.repeated = False
        self._said: set[str] = set()
        self._open = ""  # the sentence that is not complete yet
        self._num_shown = 0  # how much of it was passed on

    def feed(self, text: str) -> str:
        """Return what can be shown; nothing more once a sentence was repeated."""
        shown = ""
        self._open += text
        while not self.repeated and len(found := sentences(self._open)) > 1:
            shown += self._complete(found[0][1])
        if not self.repeated and not self._may_repeat():
            shown += self._show(len(self._open))
        return shown

    def end(self) -> str:
        """Return what was held back, unless it repeats, or was cut while repeating, a sentence."""
        words = _words(self._open)
        if self.repeated or (_counts(words) and self._may_repeat()):
            self.repeated = True
            return ""
        return self._show(len(self._open))

    def _complete(self, end: int) -> str:
        words = _words(self._open[:end])
        if words in self._said:
            self.repeated = True
            return ""
        if _counts(words):
            self._said.add(words)
        shown = self._show(end)
        self._open, self._num_shown = self._open[end:], self._num_shown - end
        return shown

    def _may_repeat(self) -> bool:
        words = _words(self._open)
        return any(said.startswith(words) for said in self._said)

    def _show(self, end: int) -> str:
        shown = self._open[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return shown


def _counts(words: str) -> bool:
    return words.count(" ") >= 3


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", MARKER.sub("", text))).lower()
