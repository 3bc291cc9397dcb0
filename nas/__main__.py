"""The `nas` command from its first moment on: what it imports takes a second, in which Ctrl-C may come."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from nas.cli import main as run
    except KeyboardInterrupt:
        print("nas: stopped before it began", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
