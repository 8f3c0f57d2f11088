"""`python -m lox_stream` is the command `lox-stream`."""

from __future__ import annotations

from lox_stream.cli import main

if __name__ == "__main__":
    main()
