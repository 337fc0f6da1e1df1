"""The operations on a volume: one verb, one file, one transaction, each a pure `decide` (see `transact.py`)."""

__all__: list[str] = []
