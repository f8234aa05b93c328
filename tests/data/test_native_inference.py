"""Training and inference ask in the same words: our voice_cloning prompt is what transformers' processor makes."""

import numpy as np
from transformers import AutoProcessor

from engine.data.audio import read_mono
from engine.data.codec import Codec
from engine.data.formats import read_conversations
from engine.data.labels import StreamIds, merge
from engine.data.layouts import SYSTEM_PROMPT, Layout
from engine.data.prompts import PromptTokenizer


def test_the_prompt_equals_the_processor_s(demo):
    processor = AutoProcessor.from_pretrained(demo.model_path)
    conversation = Layout().apply(read_conversations(demo.data_file)[3])
    waveform = read_mono(conversation.audios[0].recording, 24000)
    waveform = waveform[: len(waveform) // 960 * 960]  # the processor does not pad the last frame, training does

    def text(message: int) -> list[dict]:
        return [{"type": "text", "text": conversation.messages[message].texts[0]}]

    layout = Layout()
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {"role": "scene", "content": [{"type": "text", "text": layout.scene}]},
            {"role": "user", "content": text(1)},
            {"role": "assistant", "content": [{"type": "audio"}]},
            {"role": "user", "content": text(3)},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    native = processor(text=text, audio=[waveform], return_tensors="pt", add_special_tokens=False)
    tokenize = PromptTokenizer(processor.tokenizer)
    codes = Codec.load(demo.audio_tokenizer_path).encode([waveform])
    ours = merge(tokenize.inference(conversation), codes, tokenize.special, StreamIds())

    delay = processor.tokenizer.convert_tokens_to_ids("<|reserved_special_token_6|>")
    ids = native["input_ids"][0].numpy()
    np.testing.assert_array_equal(ours.input_ids, np.where(ids == delay, tokenize.special.audio_out, ids))
    np.testing.assert_array_equal(ours.audio_ids, native["audio_input_ids"][0].numpy())
