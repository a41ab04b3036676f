"""Packages of the optional extras, checked when something needs them."""

from __future__ import annotations

from importlib.util import find_spec

from sempa_st.errors import SempaError


def require(*packages: str, extra: str, purpose: str) -> None:
    """Check that packages are installed.

    Args:
        packages: Names under which they are imported.
        extra: Extra of this package that installs them.
        purpose: What needs them: the beginning of the error message.

    Raises:
        SempaError: If one is missing; the message says how to install it.
    """
    for package in packages:
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise SempaError(f"{purpose} needs the {name} package. Install it with: pip install 'sempa-st[{extra}]'")
