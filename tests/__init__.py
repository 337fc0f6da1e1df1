"""Tests: unit, contract, model, mounted, faults; `tests.support` starts the servers and mounts that they need."""
