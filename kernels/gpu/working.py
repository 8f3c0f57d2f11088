"""Whether Triton works on this machine: it builds its way to the driver with a C compiler, when first asked for."""

from __future__ import annotations


def why_not() -> str:
    """What keeps Triton from working, in words; nothing where it works."""
    try:
        import triton.runtime

        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as problem:  # of a compiler, a linker or the driver: whatever it is, there is no way on
        return f"{type(problem).__name__}: {(str(problem).splitlines() or ['no reason'])[0]}"
    return ""
