"""The mount: POSIX semantics over a Volume and blob stores, served through FUSE, and the command line.

The nouns:

- a *Filesystem* is everything below the kernel: names, open files, locks; it is tested without a mount;
- an *OpenFile* is one inode while it is open here: its newest body, and what was written and not yet committed;
- a *Handle* is what the kernel's number `fh` stands for;
- the *wire* is the FUSE protocol beneath pyfuse3; *operations* is the thin shell between it and the Filesystem;
- a *mount* is the daemon that holds all of it together.

Imports of this package load no FUSE library; `apollofs.fs.wire` does.
"""

__all__: list[str] = []
