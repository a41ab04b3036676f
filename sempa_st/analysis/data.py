"""The data of an analysis: NLI triplets, STS sets and a corpus of sentences, from a folder or the shipped samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sempa_st.analysis.records import Records, read_records, record_file
from sempa_st.data.nli import Triplet, load_nli
from sempa_st.data.sts import STS_TASKS, GradedPairs, local_files, read_pairs
from sempa_st.encoding import read_sentences
from sempa_st.errors import SempaError
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import file_sha256
from sempa_st.utils.run_info import fingerprint

TRIPLETS_FILE = "nli/triplets.parquet"
SAMPLE = "sample"


@dataclass(frozen=True)
class AnalysisData:
    """Data, read when first used.

    Args:
        folder: Folder with ``nli/triplets.parquet`` and ``sts/*.parquet``; the samples of this package when None.
        corpus_file: File with the sentences of :meth:`sentences`, as for :func:`sempa_st.encode_file`; those of the
            triplets and STS sets when None.
        record_paths: Run folders and result files, as for :func:`~sempa_st.analysis.records.read_records`.
    """

    folder: Path | None = None
    corpus_file: Path | None = None
    record_paths: Sequence[Path] = ()

    @property
    def source(self) -> str:
        """Name of the data, for the report."""
        return SAMPLE if self.folder is None else self.folder.resolve().name

    @cached_property
    def triplets(self) -> Sequence[Triplet]:
        """The NLI triplets."""
        if self.folder is None:
            return load_nli(SAMPLE).triplets
        file = self.folder / TRIPLETS_FILE
        if not file.is_file():
            raise SempaError(f"There are no NLI triplets in {self.folder}: {file} does not exist.")
        return load_nli(str(file)).triplets

    @cached_property
    def sts(self) -> dict[str, GradedPairs]:
        """The test pairs of the seven STS tasks by MTEB's names, SentEval's protocol; of the sample one set."""
        if self.folder is None:
            return {SAMPLE: read_pairs([asset_path("sts_sample.jsonl")])}
        return {task: read_pairs(local_files(self.folder, task, "test", "senteval")) for task in STS_TASKS}

    @cached_property
    def dev(self) -> GradedPairs:
        """The pairs of STS-B dev; the sample without a folder."""
        if self.folder is None:
            return read_pairs([asset_path("sts_sample.jsonl")])
        return read_pairs(local_files(self.folder, "STSBenchmark", "dev", "mteb"))

    @property
    def dev_name(self) -> str:
        """Name of :attr:`dev`, for the report."""
        return "the sample" if self.folder is None else "STS-B dev"

    @cached_property
    def records(self) -> Records:
        """Results of other commands."""
        return read_records(self.record_paths)

    @cached_property
    def corpus(self) -> Sequence[str]:
        """The distinct sentences of the corpus file; else of the triplets and the STS sets, in order."""
        if self.corpus_file is not None:
            return list(dict.fromkeys(sentence for _, sentence in read_sentences(self.corpus_file)))
        nli = [text for triplet in self.triplets for text in (triplet.premise, triplet.entailed, triplet.contradicted)]
        sts = [text for pairs in self.sts.values() for text in pairs.sentences if text.strip()]
        return list(dict.fromkeys([*nli, *sts]))

    def sentences(self, count: int, seed: int) -> list[str]:
        """Return ``count`` sentences of the corpus, drawn without replacement; all of them if it has no more."""
        corpus = self.corpus
        return list(corpus) if len(corpus) <= count else random.Random(seed).sample(corpus, count)

    def sample_triplets(self, count: int, seed: int) -> list[Triplet]:
        """Return ``count`` triplets, drawn without replacement; all of them if there are no more."""
        triplets = self.triplets
        return list(triplets) if len(triplets) <= count else random.Random(seed).sample(triplets, count)

    def sample_dev(self, sentences: int, seed: int) -> GradedPairs:
        """Return pairs of :attr:`dev` with ``sentences`` sentences at most, drawn without replacement, in order."""
        pairs, count = self.dev, sentences // 2
        if len(pairs) <= count:
            return pairs
        chosen = sorted(random.Random(seed).sample(range(len(pairs)), count))
        first, second, scores = pairs.first, pairs.second, pairs.scores
        return GradedPairs(*zip(*((first[index], second[index], scores[index]) for index in chosen), strict=True))

    def digest(self, need: str) -> str:
        """Return the SHA-256 (hex) of ``triplets``, ``sts``, ``dev``, ``corpus`` or ``records``."""
        if need == "corpus":
            return fingerprint(self.corpus)
        if need == "records":
            _ = self.records  # what cannot be read is an error here
            return fingerprint((str(path), file_sha256(record_file(path))) for path in self.record_paths)
        rows: Sequence[Any] = self.triplets
        if need == "sts":
            rows = [self.sts[name] for name in self.sts]
        elif need == "dev":
            rows = [self.dev]
        return fingerprint(asdict(row) for row in rows)
