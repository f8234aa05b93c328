"""Layouts: in which turns a sample is shown to the model.

A model is good at what it was trained on, so all layouts but `as_written` are the very turns of the original's
inference (prepare_generation_context in boson-ai/higgs-audio, examples/generation.py), rebuilt from whatever turns the
data has. Training in other turns than those of inference teaches to speak in a way that is never asked for::

    voice_cloning         system  prompt + scene                       one reference, as a turn of its own
                          user reference's text, assistant reference's audio, user text, assistant target
    reference_in_system   system  prompt + scene + SPEAKER0: audio     any number of references, no text of theirs
                          user text, assistant target
    single_speaker        system  prompt + scene                       no reference
                          user text, assistant target
    multi_speaker         with references: as voice_cloning, each text tagged [SPEAKERn];
                          without: the system turn describes the speakers tagged in the texts, if several

A row may have several rounds of user text and assistant audio (a dialogue); all of them follow.
"""

import re
from dataclasses import dataclass, replace

from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.text import VERSION, normalize

LAYOUTS = ("as_written", "voice_cloning", "reference_in_system", "single_speaker", "multi_speaker")
TASK_TYPES = {
    "zero_shot_voice_cloning": "voice_cloning",
    "single_speaker_smart_voice": "single_speaker",
    "multi_speaker_smart_voice": "multi_speaker",
    "multi_speaker_voice_cloning": "multi_speaker",
}
"""The task types of other trainers, as settings and as `misc.task_type` of a row."""

SYSTEM_PROMPT = "Generate audio following instruction."
MULTI_SPEAKER_PROMPT = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own."
)
SPEAKER_TAG = re.compile(r"\[(SPEAKER\d+)\]")
INSTRUCTION_PREFIXES = ("Please generate speech for given text in reference audio's voice:",)
"""What the seed puts before the target text. Only these are stripped: a colon may belong to the text itself."""


class LayoutError(ValueError):
    """A sample that does not fit the layout asked for; one clear line, the caller adds the row."""


@dataclass(frozen=True)
class Speech:
    """What a row asks for, apart from the turns in which it is written.

    Attributes:
        references: transcript (None if the row has none) and audio of each.
        rounds: text to speak and the audio that speaks it.
        context: the first so many rounds come before `start_index` and are not trained.
    """

    references: tuple[tuple[str | None, Audio], ...]
    rounds: tuple[tuple[str, Audio], ...]
    context: int


@dataclass(frozen=True)
class Layout:
    """How conversations become turns; the fields are the settings of the same names.

    Args:
        system_prompt: None means the original's: SYSTEM_PROMPT, or MULTI_SPEAKER_PROMPT where speakers are described.
        scene: where a row has no `misc.scene`.
        normalize_text: of texts to speak; transcripts of references are trimmed only, as inference does.
    """

    name: str = "auto"
    system_prompt: str | None = None
    scene: str | None = "Audio is recorded from a quiet room."
    train_reference: bool = False
    normalize_text: bool = True

    @classmethod
    def of(cls, settings) -> "Layout":
        """The layout that the settings (engine.config.Settings) ask for."""
        return cls(
            settings.prompt_layout,
            settings.system_prompt,
            settings.scene,
            settings.train_reference,
            settings.normalize_text,
        )

    @property
    def identity(self) -> dict:
        """What two prepared stores must have in common to be the same kind of data."""
        return {
            "prompt_layout": TASK_TYPES.get(self.name, self.name),
            "system_prompt": self.system_prompt,
            "scene": self.scene,
            "train_reference": self.train_reference,
            "normalize_text": VERSION if self.normalize_text else False,
        }

    def apply(self, sample: Conversation, with_references: bool = True) -> Conversation:
        """The conversation as it is trained.

        Args:
            with_references: false asks for the speech without its references; a row kept as written keeps them.

        Raises:
            LayoutError: the sample lacks what the layout needs.
        """
        name = self.name_for(sample)
        if name == "as_written":
            return sample
        speech = read_speech(sample, name)
        if not with_references and speech.references:
            speech = replace(speech, references=())
            name = name if name == "multi_speaker" and _speaker_tags(speech) else "single_speaker"
        turns = getattr(self, f"_{name}")(speech, sample.misc)
        first = len(turns)  # of the rounds' messages
        for text, audio in speech.rounds:
            spoken = normalize(text) if self.normalize_text else text
            turns += [Message("user", (Text(spoken),)), Message("assistant", (audio,))]
        if speech.context == len(speech.rounds):
            start = len(turns)
        else:
            has_reference_turn = first > 1
            start = 2 if self.train_reference and has_reference_turn else first + 2 * speech.context + 1
        return replace(sample, messages=tuple(turns), start_index=start)

    def name_for(self, sample: Conversation) -> str:
        """The layout of this sample: the one asked for, or with `auto` what its task type or its shape says."""
        if self.name != "auto":
            return TASK_TYPES.get(self.name, self.name)
        task = sample.misc.get("task_type")
        if task in (*LAYOUTS, *TASK_TYPES):
            return TASK_TYPES.get(task, task)
        return "voice_cloning" if has_seed_shape(sample) else "as_written"

    # each gives the turns before the rounds

    def _voice_cloning(self, speech: Speech, misc: dict) -> list[Message]:
        if len(speech.references) != 1:
            raise LayoutError(
                f"voice_cloning needs one reference, the row has {len(speech.references)} → multi_speaker takes "
                "several, single_speaker none, pair_references finds one; or set prompt_layout: as_written"
            )
        return [self._system(SYSTEM_PROMPT, self._scene(misc)), *self._reference_turns(speech)]

    def _reference_in_system(self, speech: Speech, misc: dict) -> list[Message]:
        if not speech.references:
            raise LayoutError(
                "reference_in_system needs a reference, the row has none → single_speaker goes without; "
                "pair_references finds one of the same speaker"
            )
        scene = self._scene(misc)
        content: list[Text | Audio] = []
        before = f"{self._prompt(SYSTEM_PROMPT)}\n\n<|scene_desc_start|>\n" + (f"{scene}\n\n" if scene else "")
        for number, (_, audio) in enumerate(speech.references):
            content += [Text(f"{before}SPEAKER{number}: "), audio]
            before = "\n"
        return [Message("system", (*content, Text("\n<|scene_desc_end|>")))]

    def _single_speaker(self, speech: Speech, misc: dict) -> list[Message]:
        return [self._system(SYSTEM_PROMPT, self._scene(misc))]

    def _multi_speaker(self, speech: Speech, misc: dict) -> list[Message]:
        if speech.references:
            return [self._system(SYSTEM_PROMPT, self._scene(misc)), *self._reference_turns(speech)]
        tags = _speaker_tags(speech)
        if not tags:
            raise LayoutError(
                "multi_speaker needs references, or texts with tags such as [SPEAKER0] → tag the texts, or set "
                "prompt_layout: single_speaker"
            )
        if len(tags) == 1:  # inference describes speakers only to tell them apart
            return self._single_speaker(speech, misc)
        given = misc.get("speakers") if isinstance(misc.get("speakers"), dict) else {}
        voices = (given.get(tag) or ("masculine" if i % 2 else "feminine") for i, tag in enumerate(tags))
        described = "\n".join(f"{tag}: {voice}" for tag, voice in zip(tags, voices, strict=True))
        scene = self._scene(misc)
        return [self._system(MULTI_SPEAKER_PROMPT, f"{scene}\n\n{described}" if scene else described)]

    def _reference_turns(self, speech: Speech) -> list[Message]:
        turns = []
        for number, (text, audio) in enumerate(speech.references):
            if text is None or not text.strip():
                remedy = "give it as misc.ref_transcript or as a text before the clip"
                raise LayoutError(f"no text of the reference → {remedy}, or set prompt_layout: reference_in_system")
            text = text.strip() if self.normalize_text else text
            tag = f"[SPEAKER{number}] " if len(speech.references) > 1 else ""
            turns += [Message("user", (Text(tag + text),)), Message("assistant", (audio,))]
        return turns

    def _system(self, prompt: str, scene: str | None) -> Message:
        described = f"\n\n<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>" if scene else ""
        return Message("system", (Text(self._prompt(prompt) + described),))

    def _prompt(self, default: str) -> str:
        return default if self.system_prompt is None else self.system_prompt

    def _scene(self, misc: dict) -> str | None:
        return misc["scene"] if isinstance(misc.get("scene"), str) else self.scene


def has_seed_shape(sample: Conversation) -> bool:
    """One user message that carries the reference audio, one assistant message that carries the target."""
    spoken = [m for m in sample.messages if m.role != "system"]
    if [m.role for m in spoken] != ["user", "assistant"]:
        return False
    user, assistant = spoken
    return len(user.audios) == 1 and len(assistant.audios) == 1 and bool(user.texts)


def _speaker_tags(speech: Speech) -> list[str]:
    return sorted({tag for text, _ in speech.rounds for tag in SPEAKER_TAG.findall(text)})


def read_speech(sample: Conversation, layout: str) -> Speech:
    """What a row asks for: references in its first user message, then rounds of text and audio.

    Raises:
        LayoutError: other turns than user and assistant in alternation, or a round without its text or audio.
    """
    spoken = [(index, m) for index, m in enumerate(sample.messages) if m.role != "system"]
    users, answers = spoken[::2], spoken[1::2]
    alternate = all(m.role == "user" for _, m in users) and all(m.role == "assistant" for _, m in answers)
    one_clip_each = all(len(m.audios) == 1 for _, m in answers) and not any(m.audios for _, m in users[1:])
    if not answers or len(users) != len(answers) or not alternate or not one_clip_each:
        raise LayoutError(
            f"prompt_layout {layout} needs user messages (text; in the first also reference audio) and assistant "
            "messages with one clip, in turn → bring the row into that form, or set prompt_layout: as_written"
        )
    references, first = _first_message(users[0][1], sample.misc, alone=len(users) == 1)
    texts = [first, *(" ".join(m.texts) for _, m in users[1:])]
    if not all(text.strip() for text in texts):
        raise LayoutError(_no_text("target"))
    rounds = tuple((text, m.audios[0]) for text, (_, m) in zip(texts, answers, strict=True))
    start = sample.start_index or 0
    return Speech(references, rounds, sum(index < start for index, _ in answers))


def _first_message(user: Message, misc: dict, alone: bool) -> tuple[tuple[tuple[str | None, Audio], ...], str]:
    """The references and the text to speak in the user message that carries them."""
    target = misc.get("target_transcript") if alone else None
    if len(user.audios) == 1:
        transcript, text = _texts_around_one_clip(user, misc.get("ref_transcript"), target)
        return ((transcript, user.audios[0]),), text
    references, text = [], None
    for item in user.content:
        if isinstance(item, Audio):
            references.append((text, item))
        text = item.text if isinstance(item, Text) else None
    written = strip_instruction(text) if text is not None else None
    if not references:
        written = strip_instruction("\n".join(user.texts))
    text = written if target is None else target
    if not isinstance(text, str):
        raise LayoutError(_no_text("target"))
    return tuple(references), text


def _texts_around_one_clip(user: Message, reference: str | None, target: str | None) -> tuple[str | None, str]:
    """Transcript of the reference and text to speak: from misc where given, else from the user's message."""
    texts = user.texts
    if len(texts) > 1:
        written = texts[0], strip_instruction(texts[-1])
    elif not texts:
        written = None, None
    else:  # a single text is the target if it says so, follows the clip, or is all that is missing
        asks = strip_instruction(texts[0]) != texts[0] or isinstance(user.content[0], Audio)
        is_target = asks or (reference is not None and target is None)
        written = (None, strip_instruction(texts[0])) if is_target else (texts[0], None)
    reference = written[0] if reference is None else reference
    target = written[1] if target is None else target
    for name, text in (("reference", reference), ("target", target)):
        if text is not None and not isinstance(text, str):
            raise LayoutError(_no_text(name))
    if target is None or not target.strip():
        raise LayoutError(_no_text("target"))
    return reference, target


def _no_text(name: str) -> str:
    key = {"reference": "ref_transcript", "target": "target_transcript"}[name]
    remedy = f"give it as misc.{key} or as a text of the user message, or set prompt_layout: as_written"
    return f"no text of the {name} → {remedy}"


def strip_instruction(text: str) -> str:
    for prefix in INSTRUCTION_PREFIXES:
        if text.lstrip().startswith(prefix):
            return text.lstrip()[len(prefix) :].strip()
    return text
