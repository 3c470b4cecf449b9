"""ChatGLM3's tokenizer, on sentencepiece alone."""

from __future__ import annotations

import logging
from pathlib import Path

MAX_TOKENS = 256
# ChatGLM3 numbers its special tokens right behind the sentencepiece vocabulary, in this order.
SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
PREFIX_TOKENS = ("[gMASK]", "sop")

logger = logging.getLogger(__name__)


class Tokenizer:
    """Turns a prompt into ChatGLM3 token ids: the prefix ``[gMASK] sop``, then the pieces of the text.

    Source: agrees token for token with diffusers' ``ChatGLMTokenizer``, which pads to 256 on the left. This
    class does not pad: every pad row of the text encoder is equal, so one is enough (see ``TextEncoder``).

    Args:
        path: the sentencepiece file ``tokenizer.model``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is no sentencepiece model.
    """

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"Tokenizer not found: {path}. Kolors' text encoder needs ChatGLM3's sentencepiece file "
                "'tokenizer.model' in the folder 'tokenizer' or 'text_encoder' of the model."
            )
        try:
            self._pieces = SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise ValueError(
                f"{path} is no sentencepiece model (damaged or an incomplete download): {error}. Fetch it again."
            ) from error
        num_pieces = self._pieces.vocab_size()
        self.special_token_ids = {token: num_pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.prefix_ids = [self.special_token_ids[token] for token in PREFIX_TOKENS]
        self.vocab_size = num_pieces + len(SPECIAL_TOKENS)
        self.pad_token_id = self._pieces.unk_id()

    def encode(self, prompt: str) -> list[int]:
        """Gives the ids of one prompt, prefix first, between 2 and 256 of them; position ids are 0, 1, 2, ….

        A longer prompt is cut to 254 pieces behind the prefix, with a warning that says how many were lost.
        """
        piece_ids = self._pieces.encode(prompt)
        room = MAX_TOKENS - len(self.prefix_ids)
        if len(piece_ids) > room:
            lost = len(piece_ids) - room
            logger.warning(
                "The prompt has %d tokens, Kolors reads %d: the last %d are ignored, from %r on.",
                len(piece_ids), room, lost, self._pieces.decode(piece_ids[room : room + 12]),
            )  # fmt: skip
        return self.prefix_ids + piece_ids[:room]
