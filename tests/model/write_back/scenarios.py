"""Small worlds, each complete for its size. A is mount 0, B mount 1, C mount 2."""

from __future__ import annotations

from tests.model.write_back.state import Operation, Scenario

WRITE_1, WRITE_2, WRITE_3 = (Operation(f"write {number}", 0) for number in (1, 2, 3))
OTHER, OTHER_TOO = Operation("write the other name", 1), Operation("write the other name too", 1)
CREATE = Operation("create", 0, needs=False)
UNLINK = Operation("unlink", 0, makes=False, needs=True)
MKDIR = Operation("mkdir", 0, needs=False, born=1)
INSIDE = Operation("create inside", 1, needs=False, after=0)
RENAME = Operation("rename", 0, waits=True)

SHARING = Scenario(
    "one mount is exclusive, changes names ahead, another reads them",
    (0, 0),
    programs=(((WRITE_1, OTHER),), ()),
    reads=((), ((0,), (1,))),
    reads_max=2,
    held=((0, 0),),
    exclusive=((0, 0),),
)
TAKING = Scenario(
    "one mount is exclusive, changes a name ahead twice, another takes the group",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ()),
    reads=((), ((0,),)),
    reads_max=2,
    takes=True,
    held=((0, 0),),
    exclusive=((0, 0),),
)
BECOMING = Scenario(
    "a holder becomes exclusive while others read, and goes on",
    (0,),
    programs=(((WRITE_1, WRITE_2, WRITE_3),), ()),
    reads=((), ((0,),)),
    reads_max=2,
    takes=True,
    held=((0, 0),),
)
ALONG = Scenario(
    "who takes one directory reads a name of another along, which a third mount holds exclusively",
    (0, 1),
    programs=(((OTHER,),), ()),
    reads=((), ((0, 1),)),
    takes=True,
    held=((1, 0),),
    exclusive=((1, 0),),
)
TWO_AT_ONCE = Scenario(
    "two names are read at once, one of a held directory; the reader's lease ends, and others change both",
    (0, 1),
    programs=(((WRITE_1, WRITE_2),), (), ((Operation("write the other name then", 1, after=0),),)),
    reads=((), ((0, 1),), ()),
    held=((0, 0), (0, 1)),
    lapses=(1,),
)
BOTH_HOLD = Scenario(
    "two mounts hold a directory, and both change it",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ((WRITE_3,),)),
    reads=((), ()),
    held=((0, 0), (0, 1)),
)
BOTH_WRITE = Scenario(
    "one mount is exclusive, another changes the same name",
    (0,),
    programs=(((WRITE_1,),), ((WRITE_3,),)),
    reads=((), ((0,),)),
    takes=True,
    held=((0, 0),),
    exclusive=((0, 0),),
)
TWO_CLAIMS = Scenario(
    "two processes of one mount claim a directory, which another reads and takes",
    (0,),
    programs=(((WRITE_1, WRITE_3), (WRITE_2,)), ()),
    reads=((), ((0,),)),
    held=((0, 0),),
)
BIRTH = Scenario(
    "a directory is wanted by another mount as soon as it is made",
    (0, 1),
    programs=(((MKDIR, INSIDE),), ()),
    reads=((), ((1,),)),
    reads_max=2,
    takes=True,
)
BIRTH_AHEAD = Scenario(
    "a directory is made ahead of etcd, and a name in it",
    (0, 1),
    programs=(((MKDIR, INSIDE),), ()),
    reads=((), ((0,), (1,))),
    reads_max=2,
    takes=True,
    held=((0, 0),),
    exclusive=((0, 0),),
    crashes=(0,),
)
ALONE = Scenario(
    "three processes of one mount change and read one name",
    (0,),
    programs=(((WRITE_1, WRITE_3), (WRITE_2,)),),
    reads=(((0,),),),
    rereads=True,
    held=((0, 0),),
)
CRASH = Scenario(
    "who has answered ahead crashes",
    (0, 0, 1),
    programs=(((WRITE_1, OTHER, Operation("write elsewhere", 2)),), ()),
    reads=((), ((0, 1),)),
    held=((0, 0),),
    exclusive=((0, 0),),
    crashes=(0,),
)
LAPSES = Scenario(
    "the lease of who has answered ahead ends at any moment",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ((WRITE_3,),)),
    reads=((), ()),
    held=((0, 0),),
    exclusive=((0, 0),),
    lapses=(0,),
)
LOST_REPLIES = Scenario(
    "replies to the committer are lost",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ()),
    reads=((), ((0,),)),
    held=((0, 0),),
    exclusive=((0, 0),),
    loses=(0,),
    gives_up=(0,),
)
ERRORS = Scenario(
    "what is refused on held facts or after a recall was so",
    (0,),
    programs=(((CREATE, Operation("create too", 0, needs=False)),), ((UNLINK,),)),
    reads=((), ()),
    held=((0, 0),),
    exclusive=((0, 0),),
)
RENAMES = Scenario(
    "a rename is shown ahead of etcd and answers when it is there",
    (0,),
    programs=(((WRITE_1, RENAME), (WRITE_2,)), ()),
    reads=((), ((0,),)),
    held=((0, 0),),
    exclusive=((0, 0),),
    crashes=(0,),
)

TURNS = Scenario(
    "two mounts change a name, and one of them takes a turn",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ((WRITE_3,),)),
    reads=(((0,),), ()),
    turns=(0, 1),
)
BOTH_TURNS = Scenario(
    "two mounts take turns, and one changes a name",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ()),
    reads=(((0,),), ((0,),)),
    turns=(0, 1),
)
TURN_AGAIN = Scenario(
    "a mount takes a turn twice, and changes a name, which another reads",
    (0,),
    programs=(((WRITE_1,),), ()),
    reads=(((0,),), ((0,),)),
    reads_max=2,
    turns=(0,),
)
TURN_READ = Scenario(
    "a mount that shares a directory takes a turn, and changes a name, which another reads",
    (0,),
    programs=(((WRITE_1,),), ()),
    reads=(((0,),), ((0,),)),
    turns=(0, 1),
    held=((0, 0),),
    exclusive=((0, 0),),
)
TURN_LAPSES = Scenario(
    "a mount takes a turn, and its lease ends at any moment",
    (0,),
    programs=(((WRITE_1,),), ((WRITE_3,),)),
    reads=(((0,),), ()),
    turns=(0, 1),
    lapses=(0,),
)
TURN_LANDS = Scenario(
    "a mount takes a turn on what was recalled from it, while its claim is under way",
    (0,),
    programs=(((WRITE_1, WRITE_2),), ((WRITE_3,),)),
    reads=(((0,),), ()),
    turns=(0,),
    held=((0, 0),),
)

QUICK = tuple(value for value in list(globals().values()) if isinstance(value, Scenario))
