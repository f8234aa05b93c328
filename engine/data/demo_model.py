"""A small random Higgs with all that belongs to it: tokenizer, audio codec, model, processor; in seconds.

The parts have the released architecture, file formats, frame rate (24 kHz, hop 960, 25 frames a second),
codebooks (8 x 1024) and special tokens, so whatever runs on them runs on the released weights; only widths
and depths are small. Weights are random save in the codec, whose scales and codebooks are fitted to synthetic
speech: a residual quantizer with arbitrary codebooks sends all audio to a handful of codes, and nothing could
be learnt from those.

Invariant: seeds are arguments, and no global random state is read or left changed.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    HubertConfig,
    PreTrainedTokenizerFast,
)

from engine.data.demo_speech import SAMPLING_RATE, SENTENCES, VOICES, synthesize

RATIOS = (8, 5, 4, 2, 3)  # the released codec's, in its order, for both encoder and decoder
HOP_LENGTH = math.prod(RATIOS)  # 960 samples, 40 ms
NUM_CODEBOOKS = 8
CODEBOOK_SIZE = 1024  # the model has 1026 rows a codebook: 1024 begins a stream, 1025 ends it

# In the released order; only the ids differ, for there the learnt vocabulary has 128,000 entries.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_out_bos|>",
    "<|reserved_special_token_6|>",
    "<|AUDIO|>",
    "<|AUDIO_OUT|>",
    "<|recipient|>",
    "<|scene_desc_start|>",
    "<|scene_desc_end|>",
    "<|generation_instruction_start|>",
    "<|generation_instruction_end|>",
    "<SE>",
    "</SE>",
    "<SE_s>",
    "</SE_s>",
    "<SE_e>",
    "</SE_e>",
    *(f"<|reserved_special_token_{number}|>" for number in range(20, 24)),
)

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

# Renders as the template of the native release does: a system message is required, a `scene` message joins
# it, an assistant's turn is one audio clip, and audio of other roles is left out.
_CHAT_TEMPLATE = """\
{%- set audio = "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>" -%}
{%- set ns = namespace(rest=messages[1:]) -%}
{%- if messages[0].role != "system" -%}
    {{- raise_exception("The first message must have the role system.") -}}
{%- elif messages[0].content is string -%}
    {%- set system = messages[0].content -%}
{%- elif messages[0].content[0].type == "text" -%}
    {%- set system = messages[0].content[0].text -%}
{%- else -%}
    {{- raise_exception("The system message must begin with text.") -}}
{%- endif -%}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\n" + system | trim -}}
{%- if ns.rest and ns.rest[0].role == "scene" -%}
    {{- "\\n\\n<|scene_desc_start|>\\n" -}}
    {%- set scene = ns.rest[0].content -%}
    {%- if scene is string -%}
        {{- scene | trim -}}
    {%- else -%}
        {%- for item in scene -%}
            {%- if item.type == "audio" -%}
                {{- " " + audio + ("" if loop.last else "\\n") -}}
            {%- elif item.type == "text" -%}
                {{- item.text | trim -}}
                {%- if not loop.last -%}
                    {{- "\\n\\n" if loop.first else ("" if loop.nextitem.type == "audio" else "\\n") -}}
                {%- endif -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "\\n<|scene_desc_end|>" -}}
    {%- set ns.rest = ns.rest[1:] -%}
{%- endif -%}
{{- "<|eot_id|>" -}}
{%- for message in ns.rest -%}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- if message.content is string or message.content[0].type != "audio" -%}
            {{- raise_exception("An assistant message must be audio.") -}}
        {%- endif -%}
        {{- audio -}}
    {%- elif message.content is string -%}
        {{- message.content | trim -}}
    {%- else -%}
        {%- for item in message.content if item.type == "text" -%}
            {{- item.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|eot_id|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n<|audio_out_bos|>" -}}
{%- endif -%}
"""


def make_tokenizer(texts: Iterable[str], path: Path, *, learnt: int = 1000) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on `texts` and saves it at `path`.

    All 256 bytes are in the vocabulary, so any language is written without loss; SPECIAL_TOKENS follow at the
    end. As in the original release there is a BOS and an EOS, no padding token, and encoding prepends the BOS
    unless told not to.

    Args:
        learnt: upper limit of the vocabulary before the special tokens; few texts yield fewer.
    """
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=learnt, min_frequency=2, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    bos, eos = SPECIAL_TOKENS[:2]
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,  # or decoding would eat the space in "so ."
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=131_072,
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def make_codec(path: Path, seed: int = 0) -> HiggsAudioV2TokenizerModel:
    """Saves a small audio tokenizer of the released layout, with its preprocessor_config.json, at `path`.

    24 kHz, 960 samples a frame, 8 codebooks of 1024. Different audio yields different codes, and decoding
    yields audible noise that follows the original's loudness and timbre; it is no speech.
    """
    acoustic = DacConfig(
        encoder_hidden_size=8,
        decoder_hidden_size=128,
        hidden_size=64,
        downsampling_ratios=list(RATIOS),
        upsampling_ratios=list(RATIOS),
        sampling_rate=SAMPLING_RATE,
    )
    semantic = HubertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32,) * 7,  # with HuBERT's own strides, product 320
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
    )
    config = HiggsAudioV2TokenizerConfig(
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
        sample_rate=SAMPLING_RATE,
        semantic_sample_rate=16_000,
        downsample_factor=320,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=64,
        target_bandwidths=[0.5, 1, 1.5, 2],  # kbit/s; the last means 8 codebooks at 25 frames of 10 bits
    )
    with _seeded(seed), torch.no_grad():
        codec = HiggsAudioV2TokenizerModel(config).eval()
        _fit(codec)
    codec.save_pretrained(path)
    _feature_extractor().save_pretrained(path)
    return codec


def make_model(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    codec_path: Path,
    seed: int = 0,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
) -> HiggsAudioV2ForConditionalGeneration:
    """Saves a small random Higgs in the native format at `path`: fp32 weights with the text head, tokenizer,
    processor.

    `AutoProcessor.from_pretrained(path)` finds the audio tokenizer at `codec_path`, of which the absolute
    form is saved. As in the native release, the tokenizer saved here pads with its EOS, which the processor
    needs.

    Args:
        hidden_size: a multiple of 32, the width of an attention head.

    Raises:
        ValueError: `hidden_size` is no multiple of 32.
    """
    heads, remainder = divmod(hidden_size, 32)
    if heads < 1 or remainder:
        raise ValueError(f"hidden_size is {hidden_size}; it must be a multiple of 32, the width of an attention head")
    token_id = tokenizer.convert_tokens_to_ids
    config = HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=32,
        num_codebooks=NUM_CODEBOOKS,
        codebook_size=CODEBOOK_SIZE + 2,
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=token_id("<|eot_id|>"),
        pad_token_id=token_id("<|end_of_text|>"),
        audio_token_id=token_id("<|AUDIO_OUT|>"),
        audio_bos_token_id=token_id("<|audio_out_bos|>"),
        audio_delay_token_id=token_id("<|reserved_special_token_6|>"),
        audio_stream_bos_id=CODEBOOK_SIZE,
        audio_stream_eos_id=CODEBOOK_SIZE + 1,
    )
    with _seeded(seed):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
        audio_tokenizer = HiggsAudioV2TokenizerModel.from_pretrained(Path(codec_path).resolve())
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=50, top_p=0.95)
    model.generation_config._from_model_config = False  # or loading would derive it from config.json again
    model.generation_config.ras_win_len = 7  # Higgs's own two, which update() does not know
    model.generation_config.ras_win_max_num_repeat = 2
    model.save_pretrained(path)

    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    HiggsAudioV2Processor(
        feature_extractor=_feature_extractor(),
        tokenizer=padding,
        audio_tokenizer=audio_tokenizer,
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(path)
    return model


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed`, on one thread: tensors this small gain nothing from more, and where other
    processes keep the cores busy, threads that wait for one another make seconds of work last a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _feature_extractor() -> DacFeatureExtractor:
    """Pads a clip at its end to a whole number of frames."""
    return DacFeatureExtractor(sampling_rate=SAMPLING_RATE, hop_length=HOP_LENGTH)


def _fit(codec: HiggsAudioV2TokenizerModel) -> None:
    """Gives each stage of a random codec a sensible scale, and codebooks drawn from synthetic speech."""
    for module in [*codec.acoustic_encoder.modules(), *codec.acoustic_decoder.modules()]:
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            # Transposed convolutions lay 2 of their taps on each output sample, whatever the kernel.
            taps = 2 if isinstance(module, nn.ConvTranspose1d) else module.kernel_size[0]
            nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
            nn.init.zeros_(module.bias)

    voices = sorted(VOICES)
    speech = [synthesize(voices[number % len(voices)], sentence) for number, sentence in enumerate(SENTENCES)]
    pad = _feature_extractor()
    clips = [pad(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_values"] for clip in speech]
    raw = torch.cat([_embed(codec, clip) for clip in clips])  # [frames, hidden]

    # fc: each feature to unit scale, then a rotation that mixes acoustics and semantics; fc2 undoes it for
    # the decoder.
    scale, mean = raw.std(0).clamp_min(1e-6), raw.mean(0)
    rotation = nn.init.orthogonal_(torch.empty_like(codec.fc.weight))
    codec.fc.weight.copy_(rotation / scale)
    codec.fc.bias.copy_(-rotation @ (mean / scale))
    acoustic = codec.fc2.out_features
    codec.fc2.weight.copy_((rotation.T * scale[:, None])[:acoustic])
    codec.fc2.bias.copy_(mean[:acoustic])

    # Each quantizer sees a random subspace of what its predecessors left. The jitter keeps entries apart
    # where frames repeat (silence), and keeps the clips used here from being coded without any error.
    residual = codec.fc(raw)
    for quantizer in codec.quantizer.quantizers:
        nn.init.orthogonal_(quantizer.project_in.weight)
        quantizer.project_out.weight.copy_(quantizer.project_in.weight.T)
        nn.init.zeros_(quantizer.project_in.bias)
        nn.init.zeros_(quantizer.project_out.bias)
        seen = quantizer.project_in(residual)
        chosen = seen[torch.randperm(len(seen)).repeat(-(-CODEBOOK_SIZE // len(seen)))[:CODEBOOK_SIZE]]
        quantizer.codebook.embed.copy_(chosen + 0.3 * seen.std() * torch.randn_like(chosen))
        quantizer.codebook.embed_avg.copy_(quantizer.codebook.embed)
        nearest = quantizer.codebook.decode(quantizer.codebook.encode(seen))
        residual = residual - quantizer.project_out(nearest)

    loudest = codec.decode(codec.encode(clips[0]).audio_codes).audio_values
    codec.acoustic_decoder.conv2.bias.sub_(0.4 * loudest.mean() / loudest.abs().max())
    codec.acoustic_decoder.conv2.weight.mul_(0.4 / loudest.abs().max())


def _embed(codec: HiggsAudioV2TokenizerModel, clip: torch.Tensor) -> torch.Tensor:
    """What `codec.encode` of a clip [1, 1, samples] feeds to fc: [frames, acoustic + semantic width]."""
    inputs = []
    handle = codec.fc.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    codec.encode(clip)
    handle.remove()
    return inputs[0]
