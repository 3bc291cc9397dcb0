"""A throw-away PostgreSQL server made with Debian's binaries, reached through a socket in its own folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 60


def missing() -> str | None:
    """Why no server can be started here, None if one can."""
    if _program("initdb") is None or _program("postgres") is None:
        return "no PostgreSQL server on PATH or in /usr/lib/postgresql; apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"no driver for PostgreSQL ({error}); pip install 'psycopg[binary]'"
    return None


@contextmanager
def server() -> Iterator[str]:
    """Yields the URL of the database `postgres`, of a superuser; all of it is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="llm-nas-postgresql-"))
    options = _unprivileged(folder) | {"cwd": folder, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    log = folder / "log"
    try:
        with log.open("wb") as output:
            initdb = [_program("initdb"), "--pgdata", folder / "data", "--username", "test", "--auth", "trust"]
            initdb += ["--encoding", "UTF8", "--no-locale", "--no-sync"]
            if subprocess.run(initdb, stdout=output, check=False, **options).returncode != 0:
                raise RuntimeError(f"initdb failed: {log.read_text(errors='replace')}")
            settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off"}
            postgres = [_program("postgres"), "-D", folder / "data"]
            postgres += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
            process = subprocess.Popen(postgres, stdout=output, **options)
        try:
            url = f"postgresql://test@/postgres?host={folder}"
            _wait_until_it_answers(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing is worth writing to the disk
            process.wait(timeout=START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear(url: str) -> None:
    """Drop all that is in the database; a database for each test would take longer to make and to remove."""
    import psycopg

    with psycopg.connect(url) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def _program(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def _unprivileged(folder: Path) -> dict[str, Any]:
    """PostgreSQL refuses to run as root: options for subprocess, and `folder` handed to the user that they name."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline_s = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')}") from error
        time.sleep(0.05)
