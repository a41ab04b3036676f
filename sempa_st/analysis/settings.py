"""Settings of an analysis. The command line reads them, so this file imports no heavy library."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.errors import SempaError
from sempa_st.utils.devices import DTYPES
from sempa_st.utils.options import option


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis; each is a flag of ``sempa analyze``.

    Args:
        sentences: Sentences of the corpus for the geometry and the GAR, and at most this many of STS-B dev for the
            strata and the layers; at least 2.
        share: Share of the NLI triplets in the PCA picture, above 0 and at most 1.
        k: Number of vocabulary tokens that are aligned with an embedding, at least 1.
        seed: Seed of every choice of data.
        cell_triplets: Triplets that each run of the part ``templates`` trains on, at least 1.
        cell_seeds: Runs for each pair of templates, at least 1.
        cell_pairs: Pairs of STS-B dev that these runs are scored on, at least 2.
        batch_size: Sentences per batch.
        dtype: As for :func:`sempa_st.load`.
        device: As for :func:`sempa_st.load`.

    Raises:
        SempaError: On a value out of range.
    """

    sentences: int = option(10_000, "sentences for the geometry, the GAR, the strata and the layers")
    share: float = option(0.002, "share of the NLI triplets in the PCA picture")
    k: int = option(10, "number of vocabulary tokens that are aligned with an embedding")
    seed: int = option(0, "seed of every choice of data")
    cell_triplets: int = option(256, "triplets that each run of the part templates trains on")
    cell_seeds: int = option(3, "runs for each pair of templates")
    cell_pairs: int = option(300, "pairs of STS-B dev that these runs are scored on")
    batch_size: int = option(32, "sentences per batch")
    dtype: str = option("auto", "floating-point type", choices=DTYPES)
    device: str | None = option(None, "cpu, cuda, ...; the fastest available if left out")

    def __post_init__(self) -> None:
        least_of = {"sentences": 2, "cell_pairs": 2}
        for name, least in {**dict.fromkeys(("k", "batch_size", "cell_triplets", "cell_seeds"), 1), **least_of}.items():
            if (value := getattr(self, name)) < least:
                raise SempaError(f"{name} is {value}. Expected at least {least}.")
        if not 0 < self.share <= 1:
            raise SempaError(f"share is {self.share}. Expected a number above 0 and at most 1.")
