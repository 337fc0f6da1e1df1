"""The protocol of locks as a small state machine: `world` is what may happen, `explorer` walks all of it."""
