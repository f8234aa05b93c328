"""From a conversation to the text tokens that the original code trains on.

Two layouts:

* `as_written`: every message as it stands, exactly as `prepare_chatml_sample` of boson-ai/higgs-audio does.
* `voice_cloning`: the turns of the original's own cloning inference, rebuilt from a seed-style sample::

    system     Generate audio following instruction. + scene description
    user       transcript of the reference
    assistant  reference audio                            (context; trained only if train_reference)
    user       text to speak
    assistant  target audio

Training in the layout of inference is what makes the tuned model usable: a model trained to read the target
text in its own turn first speaks differently from what is asked of it later.
"""

from dataclasses import dataclass, replace

import numpy as np

from engine.data.conversation import Audio, Conversation, Message, Text

IGNORED = -100
"""Label of a position that is not trained."""

INSTRUCTION_PREFIXES = ("Please generate speech for given text in reference audio's voice:",)
"""What the seed puts before the target text. Only these are stripped: a colon may belong to the text itself."""


class LayoutError(ValueError):
    """A sample that does not fit the layout asked for; one clear line, the caller adds the row."""


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


@dataclass(frozen=True)
class Layout:
    """How conversations become turns (settings prompt_layout, system_prompt, scene, train_reference)."""

    name: str = "auto"
    system_prompt: str = "Generate audio following instruction."
    scene: str | None = "Audio is recorded from a quiet room."
    train_reference: bool = False

    def apply(self, sample: Conversation) -> Conversation:
        """The conversation as it is trained.

        Raises:
            LayoutError: the sample lacks what `voice_cloning` needs.
        """
        if self.name == "as_written" or (self.name == "auto" and not has_seed_shape(sample)):
            return sample
        return self._voice_cloning(sample)

    def _voice_cloning(self, sample: Conversation) -> Conversation:
        if not has_seed_shape(sample):
            raise LayoutError(
                "prompt_layout voice_cloning needs one user message with reference audio and texts, and one "
                "assistant message with audio → bring the row into that form, or set prompt_layout: as_written"
            )
        user = next(m for m in sample.messages if m.role == "user")
        answer = next(i for i, m in enumerate(sample.messages) if m.role == "assistant")
        reference_text, target_text = _texts(sample, user)
        target_trained = sample.start_index is None or answer >= sample.start_index
        first_trained = 2 if self.train_reference else 4
        turns = (
            Message("system", (Text(self.system_text()),)),
            Message("user", (Text(reference_text),)),
            Message("assistant", (user.audios[0],)),
            Message("user", (Text(target_text),)),
            Message("assistant", (sample.messages[answer].audios[-1],)),
        )
        return replace(sample, messages=turns, start_index=first_trained if target_trained else len(turns))

    def system_text(self) -> str:
        if not self.scene:
            return self.system_prompt
        return f"{self.system_prompt}\n\n<|scene_desc_start|>\n{self.scene}\n<|scene_desc_end|>"


def has_seed_shape(sample: Conversation) -> bool:
    """One user message that carries the reference audio, one assistant message that carries the target."""
    spoken = [m for m in sample.messages if m.role != "system"]
    if [m.role for m in spoken] != ["user", "assistant"]:
        return False
    user, assistant = spoken
    return len(user.audios) == 1 and len(assistant.audios) == 1 and bool(user.texts)


def _texts(sample: Conversation, user: Message) -> tuple[str, str]:
    """Transcript of the reference and text to speak: from misc where given, else from the user's message."""
    reference, target = sample.misc.get("ref_transcript"), sample.misc.get("target_transcript")
    texts = user.texts
    if len(texts) > 1:
        written = texts[0], strip_instruction(texts[-1])
    else:  # a single text is the target if it says so, follows the clip, or is all that is missing
        asks = strip_instruction(texts[0]) != texts[0] or isinstance(user.content[0], Audio)
        is_target = asks or (reference is not None and target is None)
        written = (None, strip_instruction(texts[0])) if is_target else (texts[0], None)
    reference = written[0] if reference is None else reference
    target = written[1] if target is None else target
    for name, key, text in (("reference", "ref_transcript", reference), ("target", "target_transcript", target)):
        if not isinstance(text, str) or not text.strip():
            remedy = f"give it as misc.{key} or as a text of the user message, or set prompt_layout: as_written"
            raise LayoutError(f"no text of the {name} → {remedy}")
    return reference, target


def strip_instruction(text: str) -> str:
    for prefix in INSTRUCTION_PREFIXES:
        if text.lstrip().startswith(prefix):
            return text.lstrip()[len(prefix) :].strip()
    return text


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
