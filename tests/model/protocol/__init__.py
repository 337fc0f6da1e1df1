"""The delegation and fencing protocol as a small state machine that is explored exhaustively.

`rules` names what can be switched off, and takes from the product what is pure; `state` is what there is, `world` what
the steps share; `readers`, `writers`, `sessions` and `kernel` are the steps; `explorer` walks all of them; `scenarios`
are the small worlds.
"""

__all__ = ["explorer", "kernel", "readers", "rules", "scenarios", "sessions", "state", "world", "writers"]
