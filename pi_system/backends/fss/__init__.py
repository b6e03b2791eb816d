"""The function-secret-sharing backend: one round trip per ReLU layer (docs/protocol.md)."""
