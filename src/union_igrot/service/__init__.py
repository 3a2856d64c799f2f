"""The HTTP interface of a gallery, the server that it shares with the demo, and the server for assistants (MCP)."""
