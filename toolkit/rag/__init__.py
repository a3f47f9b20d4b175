"""TeleRAG: retrieval that fetches ahead while the model is still generating.

build_index(find_corpus("docs/"), Path("index"), Encoder.load())
answer = ask(Retriever.open("index"), OpenAIGenerator("http://localhost:8000"), "How ...?")
"""

from toolkit.rag.answer import Answer, ask
from toolkit.rag.build import Built, Updated, build_index, update_index
from toolkit.rag.citations import Citation
from toolkit.rag.corpus import Corpus, Document, Passage
from toolkit.rag.embed import Encoder
from toolkit.rag.foresight import find_mode
from toolkit.rag.generator import EndpointError, Generator, Message, OpenAIGenerator
from toolkit.rag.lexical import Lexical
from toolkit.rag.retriever import Hit, Retriever
from toolkit.rag.rounds import Recording, Replay
from toolkit.rag.sources import find as find_corpus

__all__ = [
    "Answer", "Built", "Citation", "Corpus", "Document", "Encoder", "EndpointError", "Generator",
    "Hit", "Lexical", "Message", "OpenAIGenerator", "Passage", "Recording", "Replay", "Retriever",
    "Updated", "ask", "build_index", "find_corpus", "find_mode", "update_index",
]  # fmt: skip
