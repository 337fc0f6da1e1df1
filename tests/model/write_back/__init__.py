"""The write-back of names as a small state machine that is explored exhaustively, beside that of the delegations.

`rules` names what can be switched off, and takes from the product what is pure; `state` is what there is, `world` what
the steps share; `holder`, `callers`, `readers` and `sessions` are the steps; `scenarios` are the small worlds.
"""

__all__ = ["callers", "holder", "readers", "rules", "scenarios", "sessions", "state", "world"]
