"""From a conversation to the text tokens that the original code trains on (its prepare_chatml_sample)."""

from dataclasses import dataclass, replace

import numpy as np

from engine.data.conversation import Audio, Conversation, Text
from engine.data.layouts import LayoutError

IGNORED = -100
"""Label of a position that is not trained."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the audio placeholders, from the tokenizer."""

    audio_in: int
    audio_out: int

    @classmethod
    def of(cls, tokenizer) -> "SpecialTokens":
        return cls(*(tokenizer.convert_tokens_to_ids(t) for t in ("<|AUDIO|>", "<|AUDIO_OUT|>")))


@dataclass(frozen=True)
class Prompt:
    """Text side of a sample: one placeholder token for each clip, codes not yet merged in.

    Attributes:
        input_ids, labels: int32 [n].
        audios: the clips, in the order of their placeholders.
        trained: for each clip, whether its codes are targets.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    audios: tuple[Audio, ...]
    trained: tuple[bool, ...]


class PromptTokenizer:
    """Tokenises conversations turn by turn and content by content, as the original does.

    Each piece is encoded on its own (no merges across pieces), nothing is trimmed or inserted, and only
    assistant turns from `start_index` on are labelled. A kept quirk of the original: the tokens of a
    `recipient` are labelled even on a masked turn.
    """

    AUDIO_IN = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    AUDIO_OUT = "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = SpecialTokens.of(tokenizer)
        self._markup: dict[str, list[int]] = {}

    def __call__(self, sample: Conversation) -> Prompt:
        """Tokens and labels of a whole conversation.

        Raises:
            LayoutError: a text contains an audio placeholder token, which would shift all codes.
        """
        ids: list[int] = []
        labels: list[int] = []
        audios: list[Audio] = []
        trained_clips: list[bool] = []

        def add(tokens: list[int], trained: bool) -> None:
            ids.extend(tokens)
            labels.extend(tokens if trained else [IGNORED] * len(tokens))

        for turn, message in enumerate(sample.messages):
            assistant = message.role == "assistant"
            trained = assistant and (sample.start_index is None or turn >= sample.start_index)
            add(self._prefix(message.role, first=turn == 0), False)
            if message.recipient:
                add(self._text(f"{message.recipient}<|recipient|>"), True)
            for item in message.content:
                if isinstance(item, Text):
                    add(self._text(item.text), trained)
                else:
                    add(self._encode_markup(self.AUDIO_OUT if assistant else self.AUDIO_IN), trained)
                    audios.append(item)
                    trained_clips.append(trained)
            follows = sample.messages[turn + 1].role if turn + 1 < len(sample.messages) else None
            add(self._encode_markup("<|eom_id|>" if assistant and follows == "assistant" else "<|eot_id|>"), trained)
        return Prompt(np.array(ids, np.int32), np.array(labels, np.int32), tuple(audios), tuple(trained_clips))

    def heard(self, prompt: Prompt) -> list[bool]:
        """For each clip, whether it stands in a user or system message (`<|AUDIO|>`), where Whisper may hear it."""
        ids, special = prompt.input_ids, self.special
        return (ids[(ids == special.audio_in) | (ids == special.audio_out)] == special.audio_in).tolist()

    def inference(self, sample: Conversation) -> Prompt:
        """The prompt that asks for the last assistant turn: everything before it, its header, `<|audio_out_bos|>`."""
        context = self(replace(sample, messages=sample.messages[:-1], start_index=None))
        cue = self._prefix("assistant", first=False) + self._encode_markup("<|audio_out_bos|>")
        ids = np.concatenate([context.input_ids, np.array(cue, np.int32)])
        nothing = np.full(len(ids), IGNORED, np.int32)
        return Prompt(ids, nothing, context.audios, (False,) * len(context.audios))

    def _prefix(self, role: str, first: bool) -> list[int]:
        start = "<|begin_of_text|>" if first else ""
        return self._encode_markup(f"{start}<|start_header_id|>{role}<|end_header_id|>\n\n")

    def _encode_markup(self, markup: str) -> list[int]:
        if markup not in self._markup:
            self._markup[markup] = self.tokenizer.encode(markup, add_special_tokens=False)
        return self._markup[markup]

    def _text(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if self.special.audio_in in tokens or self.special.audio_out in tokens:
            raise LayoutError("a text contains <|AUDIO|> or <|AUDIO_OUT|> → give clips as audio items instead")
        return tokens
