"""The agent of a site: what has to be done there although nobody asks for it.

Nouns:

- *candidate*: a process `apollofs agent`; one of a site's candidates is elected, the others wait (`agent`).
- *duty*: a task that the elected one runs as long as it is that (`duties`).
- *job*: a file whose body may have to be copied here; the *backlog* holds those that are open (`backlog`).
- *feed*: where jobs come from: the journal, and what readers wait for (`feed`); a *walk* makes them of a tree whose
  policy has changed (`moving`). The *copier* does them (`copier`).
- *state*: how far this site has come, in etcd (`state`): the next agent goes on from there.
"""

from __future__ import annotations

from .agent import run_agent
from .context import AgentOptions

__all__ = ["AgentOptions", "run_agent"]
