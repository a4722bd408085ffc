"""The HTTP API and the page of `search`."""
