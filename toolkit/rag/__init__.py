"""TeleRAG: retrieval that fetches ahead while the model is still generating."""
