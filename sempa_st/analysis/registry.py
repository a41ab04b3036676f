"""The parts of an analysis, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence

from sempa_st.analysis import (
    curve_part,
    frontier_part,
    gar,
    geometry_part,
    layers_part,
    pca,
    strata_part,
    templates_part,
    tokens_part,
)
from sempa_st.analysis.part import Part
from sempa_st.errors import SempaError

PARTS: tuple[Part, ...] = (
    geometry_part.PART,
    pca.PART,
    tokens_part.PART,
    gar.PART,
    layers_part.PART,
    strata_part.PART,  # after the layers, whose forward pass leaves it the embeddings
    curve_part.PART,
    frontier_part.PART,
    templates_part.PART,
)


def find_parts(names: Sequence[str] | None) -> list[Part]:
    """Return parts by name, in the order of the report; when ``names`` is None, all that are not ``by_name``.

    Raises:
        SempaError: If a name is unknown, or there is none.
    """
    known = {part.name: part for part in PARTS}
    for name in [""] if names is not None and not names else names or ():
        if name not in known:
            raise SempaError(f"Unknown part {name!r}. Expected some of: {', '.join(known)}.")
    return [part for part in PARTS if (not part.by_name if names is None else part.name in names)]
