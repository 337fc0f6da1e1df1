"""Small worlds, each complete for its size. A is mount 0, B mount 1, C mount 2."""

from __future__ import annotations

from dataclasses import replace

from tests.model.protocol.state import COUNT, NAME, OWN, Key, Mutation, Scenario
from tests.model.protocol.writers import LOCK, UNLOCK

Program = tuple[tuple[Mutation, ...], ...]
ONE = (Key(0, NAME),)
TWO = (Key(0, NAME), Key(1, NAME))
FIRST, SECOND, THIRD = (Mutation(f"write {number}", (0,)) for number in (1, 2, 3))
UNDER_LOCK = (
    Mutation("write 1 under the lock", (0,), locked=True),
    Mutation("write 2 under the lock", (0,), locked=True),
)
MAKE, MAKE_TOO = Mutation("create x", (0,), exclusive=True), Mutation("create x too", (0,), exclusive=True)
OTHER = Mutation("create y", (1,), exclusive=True)
RENAME = Mutation("rename from 0 to 1", (0, 1))
RENAME_BACK = Mutation("rename from 1 to 0", (1, 0))
MKDIR = Mutation("mkdir 1", (0,), born=1)
MKDIR_COUNTED, MKDIR_AGAIN = Mutation("mkdir a", (0, 1)), Mutation("mkdir b", (0, 1))
CREATE_INSIDE = Mutation("create in 1", (1,), after=0)
LINK = Mutation("link", (0, 1, 2))
CHMOD = Mutation("chmod by number", (2,))


def calls(*mutations: Mutation) -> Program:
    """One operation after the other, each in a transaction of its own."""
    return tuple((mutation,) for mutation in mutations)


DELAYS = Scenario(
    "two mounts read and write one name, everything is delayed",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), (0,)),
)
WAITING = Scenario(
    "one mount writes what another reads again and again",
    ONE,
    programs=((), (calls(FIRST),)),
    reads=((0,), ()),
)
BOTH_WAIT = Scenario(
    "two operations of one mount wait for the same holder",
    ONE,
    programs=((calls(FIRST), calls(SECOND)), ()),
    reads=((), (0,)),
)
LATE_READS = Scenario(
    "replies to plain reads arrive late, while the group is taken, written and recalled",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), ()),
    plain=(0,),
)
COUNTS = Scenario(
    "the number of subdirectories is counted, and changed by own operations meanwhile",
    (Key(0, NAME), Key(0, COUNT)),
    programs=((calls(MKDIR_COUNTED),), (calls(MKDIR_AGAIN),)),
    reads=((0, 1), ()),
    plain=(0,),
)
TWO_DIRECTORIES = Scenario(
    "a rename changes two groups, each held by somebody",
    TWO,
    programs=((calls(RENAME),), (calls(FIRST),)),
    reads=((0, 1), (1,)),
    rests=True,
)
BIRTH = Scenario(
    "a new directory is held from its birth, and somebody else makes a name in it at once",
    TWO,
    programs=((calls(MKDIR),), (calls(CREATE_INSIDE),)),
    reads=((1,), (1,)),
)
SEVERAL_NAMES = Scenario(
    "a file with two names is a group of its own",
    (Key(0, NAME), Key(0, NAME), Key(1, OWN)),
    programs=((calls(LINK),), (calls(CHMOD),)),
    reads=((0,), (2,)),
)
THREE_MOUNTS = Scenario(
    "one writes what two others hold",
    ONE,
    programs=((), (), (calls(FIRST),)),
    reads=((0,), (0,), ()),
)
LAPSES = Scenario(
    "the lease of a mount ends at any moment, it is frozen for any time, and comes back as a new session",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), ()),
    lapses=(0,),
)
CRASH = Scenario(
    "a holder that writes crashes",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), (0,)),
    crashes=(0,),
)
LOST_REPLIES = Scenario(
    "replies are lost, transactions sent again, and the session may end",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), ()),
    loses=(0,),
    lapses=(0,),
)
DEADLINES = Scenario(
    "operations are given up, and copies of them arrive later",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), ()),
    gives_up=(0,),
)
BATCHES = Scenario(
    "operations of one mount share a transaction",
    TWO,
    programs=((((MAKE, OTHER),),), (calls(MAKE_TOO),)),
    reads=((), (1,)),
    gives_up=(0,),
    loses=(0,),
)
SAME_NAME = Scenario(
    "two operations of one mount make the same name at once",
    ONE,
    programs=((((MAKE, MAKE_TOO),),),),
    reads=((),),
)
LOCKS = Scenario(
    "two mounts write in turn under one lock, and the session of one ends",
    ONE,
    programs=((calls(LOCK, UNDER_LOCK[0], UNLOCK),), (calls(LOCK, UNDER_LOCK[1], UNLOCK),)),
    reads=((), (0,)),
    lapses=(0,),
)
DEAF = Scenario(
    "the watch of a holder's inbox breaks while two others want its delegation, and one of them crashes",
    ONE,
    programs=((), (calls(FIRST),), (calls(SECOND),)),
    reads=((0,), (), ()),
    deaf=(0,),
    crashes=(1,),
)
KERNEL = Scenario(
    "the kernel of a holder caches names; another mount writes",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), ()),
    kernel=True,
    lapses=(0,),
)
KERNEL_ATTRIBUTES = Scenario(
    "the kernel of a holder caches attributes and a name of one directory",
    (Key(0, NAME), Key(0, OWN)),
    programs=((), (calls(Mutation("create, which changes the directory", (0, 1))),)),
    reads=((0, 1), ()),
    kernel=True,
)
BOTH_CHANGE = Scenario(
    "two mounts both hold a directory, their kernels too, and both change it",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), (0,)),
    kernel=True,
    held=((0, 0), (0, 1)),
    rests=True,
)
TAKEN_AGAIN = Scenario(
    "two mounts change a directory that both hold, and others on each host go on reading it",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),)),
    reads=((0,), (0,)),
    rests=True,
    kernel=True,
    held=((0, 0), (0, 1)),
    complete=False,
)
RENAMES_MEET = Scenario(
    "two mounts rename between two directories, in opposite directions",
    TWO,
    programs=((calls(RENAME),), (calls(RENAME_BACK),)),
    reads=((0,), (1,)),
    kernel=True,
    held=((0, 0), (1, 1)),
    rests=True,
)

# -- larger ones, for APOLLOFS_MODEL_STATES ----------------------------------------------------------------------------

DELAYS_LONGER = Scenario(
    "as DELAYS, with two operations of the first",
    ONE,
    programs=((calls(FIRST, SECOND),), (calls(THIRD),)),
    reads=((0,), (0,)),
)
TWO_CALLERS = Scenario(
    "two operations of one mount at once, another mount's, and both read",
    ONE,
    programs=((calls(FIRST), calls(SECOND)), (calls(THIRD),)),
    reads=((0,), (0,)),
    rests=True,
)
THREE_WRITERS = Scenario(
    "three mounts write one name, two of them hold it now and then",
    ONE,
    programs=((calls(FIRST),), (calls(SECOND),), (calls(THIRD),)),
    reads=((0,), (0,), ()),
    rests=True,
)
TWO_DIRECTORIES_ALL = replace(TWO_DIRECTORIES, name="as TWO_DIRECTORIES, all reads, to the end", rests=False)
KERNEL_BOTH = replace(KERNEL, name="as KERNEL, both mounts read", reads=((0,), (0,)), rests=True)
BOTH_LAPSE = replace(LAPSES, name="as LAPSES, of both mounts", lapses=(0, 1), rests=True)

DEEP = (DELAYS_LONGER, TWO_CALLERS, THREE_WRITERS, TWO_DIRECTORIES_ALL, KERNEL_BOTH, BOTH_LAPSE)
QUICK = tuple(
    value
    for value in list(globals().values())
    if isinstance(value, Scenario) and not any(value is deep for deep in DEEP)
)
