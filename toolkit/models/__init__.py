"""The model zoo and where weights come from."""
