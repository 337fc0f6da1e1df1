"""The command `apollofs`: one small module for each group of commands.

- `app` holds the root command and `main`; `errors` turns every failure into one line and a status;
- `volume` makes, checks and destroys volumes; `site` keeps their sites;
- `mounting` mounts and unmounts; `reports` tells about mounts and files;
- `embedded` brings a private volume up and down; `helper` is what mount(8) and systemd call.

Here, and only here, the environment is read. Modules that start threads or take long to import are imported by the
command that needs them, after it has forked.
"""

from apollofs.fs.cli.app import main

__all__ = ["main"]
