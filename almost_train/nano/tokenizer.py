"""The nano family's tokenizer: byte-level BPE in which the dialogue's markers are one token each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almost_eval.nano.documents import document as world_document
from almost_eval.nano.seeded import byte_level_bpe
from almost_eval.nano.world import SEPARATOR, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, HUMAN, ASSISTANT = "<pad>", "\n\nHuman:", "\n\nAssistant:"
VOCAB_SIZE = 1280
"""At most: the world's text runs out of pairs to merge at some 1,100."""
MAX_LENGTH = 2048


def make_tokenizer(world: World, *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the turns' openings and the separator are one token each; loses nothing of any text.

    The separator is the end-of-text token: few-shot prompts, pre-training documents and the EOS of the chat template
    are then the same text. There is no BOS, which some libraries would add and others not.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    rng = world.generator("tokenizer")
    text = []
    for _ in range(4000):
        document = world_document(world, rng)
        for marker in (SEPARATOR, HUMAN, ASSISTANT):
            document = document.replace(marker, "\n")  # tokens of their own: nothing is to be merged across them
        text.append(document)
    # The ends of evaluation prompts, so that a label with its space is one token.
    text += [f"Response {letter} Reply {letter} answer is true is false" for letter in "ABCD"] * 50

    tokenizer = byte_level_bpe(text, vocab_size - 2, [PAD, SEPARATOR])  # the two turns follow
    # Not special: decoding with skip_special_tokens must keep a turn that a model opens, as stop strings look for it.
    tokenizer.add_tokens([AddedToken(turn, normalized=False) for turn in (HUMAN, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token types
        clean_up_tokenization_spaces=False,  # decoding must give the text back as it was
    )
