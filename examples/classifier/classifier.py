"""Sorts messages to a support desk into topics. It trains at the start, with only numpy.

A message is a vector that counts its words. The caller makes the vectors, all of them as one block
of shared memory, and the handler reads them in place. `web.mjs` is such a caller.
"""

import re
from pathlib import Path

import latzero
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float32]
WORDS = 1024  # How many numbers a vector has. Words with the same hash share one.


def vector_of(text: str) -> Numbers:
    """Counts the words of a text; `web.mjs` has the same function."""
    vector = np.zeros(WORDS, "f4")
    for word in re.findall(r"[a-z]+", text.lower()):
        hash = 2166136261
        for letter in word:
            hash = (hash ^ ord(letter)) * 16777619 % 2**32
        vector[hash % WORDS] += 1
    vector /= max(np.linalg.norm(vector), 1)
    return vector


def softmax(scores: Numbers) -> Numbers:
    powers: Numbers = np.exp(scores - scores.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers


def train(
    vectors: Numbers, topics: NDArray[np.int_], count: int, steps: int = 400, rate: float = 20.0,
    decay: float = 1e-4,
) -> Numbers:
    """The weights of a softmax regression, by gradient descent."""
    weights = np.zeros((WORDS, count), "f4")
    wanted = np.eye(count, dtype="f4")[topics]
    for _ in range(steps):
        slope = vectors.T @ (softmax(vectors @ weights) - wanted) / len(vectors)
        weights -= rate * (slope + decay * weights)
    return weights


lines = Path(__file__).with_name("messages.tsv").read_text().splitlines()
names, texts = zip(*(line.split("\t") for line in lines))
labels = sorted(set(names))
vectors = np.array([vector_of(text) for text in texts])
topics = np.array([labels.index(name) for name in names])
held_out = np.arange(len(texts)) % 5 == 0  # Not trained with, to see how good the weights are.
weights = train(vectors[~held_out], topics[~held_out], len(labels))
right = (vectors[held_out] @ weights).argmax(axis=1) == topics[held_out]

app = latzero.connect("latzero://classifier?pool=support")


@app.serve
def classify(vectors: latzero.Block) -> list[dict[str, str | float]]:
    """The topic of each row of a block of vectors, and how sure that is."""
    with vectors.view() as rows:
        odds = softmax(rows @ weights)
    best = odds.argmax(axis=1)
    return [
        {"topic": labels[topic], "sure": round(float(row[topic]), 3)}
        for topic, row in zip(best, odds)
    ]


print(f"ready: {right.sum()} of {len(right)} unseen messages are sorted right", flush=True)
app.wait()
