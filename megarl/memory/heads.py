"""From the last hidden states to log-probs or values: what is kept and what is used, in bytes of one rank."""

from dataclasses import dataclass

from megarl.memory.activations import FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """One role's head on the last pipeline stage.

    Attributes:
        rows: trained tokens of a micro-batch on this rank.
        hidden_size: h.
        vocabulary: rows of the output layer on this rank, V; 0 for a value head.
        chunk: ``logprob_chunk_tokens``.
        element: bytes of an element of the model's type.
    """

    rows: int
    hidden_size: int
    vocabulary: int
    chunk: int
    element: int

    @property
    def chunk_elements(self) -> int:
        """Logits that exist at the same time."""
        return min(self.chunk, self.rows) * self.vocabulary

    @property
    def weight_elements(self) -> int:
        """V·h."""
        return self.vocabulary * self.hidden_size


def kept(shape: HeadShape) -> float:
    """Hidden states of the trained tokens, in float32 for values; log-probs, entropies, normalisers and the objective's
    terms."""
    element = shape.element if shape.vocabulary else FLOAT
    return shape.rows * (shape.hidden_size * element + 10 * FLOAT)


def forward(shape: HeadShape) -> float:
    """A chunk's logits and their exponents in float32; at no time more, so the length of sequences does not count."""
    return 2 * FLOAT * shape.chunk_elements


def backward(shape: HeadShape) -> float:
    """Gradients of the hidden states and, in float32, of the output layer; a chunk's log-probs and probabilities.

    In bfloat16 also a chunk's gradient, and its share of the output layer's in both types.
    """
    hidden = shape.rows * shape.hidden_size * (shape.element if shape.vocabulary else 2 * FLOAT)
    chunk = 2 * FLOAT * shape.chunk_elements
    if shape.element != FLOAT:
        both = shape.element + FLOAT
        chunk = max(chunk, both * shape.chunk_elements + both * shape.weight_elements)
    return hidden + FLOAT * shape.weight_elements + chunk
