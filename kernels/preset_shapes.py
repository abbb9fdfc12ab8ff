"""The shapes that the kernels meet: what the presets and the masks of the recipes make, for
benchmarks, checks and tests.

Numbers, since nothing in here may import the models; tests/test_preset_shapes.py makes them again
from presets and masks.
Letters: N tokens of a clip, V visible, M masked (to be predicted).
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """A preset at 16 x 224 x 224 under tube masking of 0.9; `dual`: M where the decoder predicts
    half of what is masked.
    """

    preset: str
    tubelet: tuple[int, int, int]
    tokens: int
    visible: int
    masked: int
    dual: int
    heads: int
    head_width: int
    decoder_heads: int
    decoder_head_width: int

    @property
    def predicted(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """(name, tokens that the decoder predicts) of both ways."""
        return ("full", self.masked), ("dual", self.dual)


class AttentionShape(NamedTuple):
    """What packed_attention gets."""

    name: str
    tokens: int
    heads: int
    width: int


OF_16_PIXELS = (2, 16, 16), 1568, 160, 1408, 704
SHAPES = (
    Shape("small", *OF_16_PIXELS, 6, 64, 3, 64),
    Shape("base", *OF_16_PIXELS, 12, 64, 6, 64),
    Shape("large", *OF_16_PIXELS, 16, 64, 8, 64),
    Shape("huge", *OF_16_PIXELS, 16, 80, 8, 80),
    Shape("giant", (2, 14, 14), 2048, 208, 1840, 920, 16, 88, 8, 64),
)
# that the encoders of all recipes see, class tokens among them
ENCODER_TOKENS = (32, 37, 50, 54, 157, 160, 208, 392)


def attention_shapes() -> list[AttentionShape]:
    """Encoder, decoder, its dual form, and fine-tuning, of every preset; names as the benchmark has
    them.
    """
    found = []
    for shape in SHAPES:
        encoder = shape.heads, shape.head_width
        decoder = shape.decoder_heads, shape.decoder_head_width
        found += [
            AttentionShape(f"encoder {shape.preset}", shape.visible, *encoder),
            AttentionShape(f"decoder {shape.preset}", shape.visible + shape.masked, *decoder),
            AttentionShape(f"decoder dual {shape.preset}", shape.visible + shape.dual, *decoder),
            AttentionShape(f"fine-tune {shape.preset}", shape.tokens, *encoder),
        ]
    return found
