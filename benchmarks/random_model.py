"""Writes a Higgs Audio v2 of the released size with random weights: for loading, memory and speed, not for speech.

    python -m benchmarks.random_model random-higgs --tokenizer output/demo/model       # 11.5 GB in bf16
    bash launch/train.sh --model_path random-higgs --audio_tokenizer_path output/demo/audio_tokenizer \
        --train_data_file output/demo/data/demo.json --use_lora --bf16 --backend fsdp --max_steps 1

One shard is in memory at a time. The tokenizer is any of ours (the demo's, say); token ids follow it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HiggsAudioV2Config

from engine.export.model_folder import DTYPES, generation_defaults, require_free, write_model_folder
from engine.model.initial import build_on_meta
from engine.model.weights import load_tokenizer


def configuration(tokenizer, layers: int, hidden_size: int, intermediate_size: int) -> HiggsAudioV2Config:
    """The released geometry, but for what is asked otherwise, with the ids of a tokenizer."""
    token_id = tokenizer.convert_tokens_to_ids
    return HiggsAudioV2Config(
        num_hidden_layers=layers, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_attention_heads=hidden_size // 128, num_key_value_heads=max(1, hidden_size // 384), codebook_size=1026,
        bos_token_id=token_id("<|begin_of_text|>"), eos_token_id=token_id("<|eot_id|>"),
        pad_token_id=token_id("<|end_of_text|>"), audio_token_id=token_id("<|AUDIO_OUT|>"),
        audio_bos_token_id=token_id("<|audio_out_bos|>"),
        audio_delay_token_id=token_id("<|reserved_special_token_6|>"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder whose tokenizer is taken")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden_size", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--intermediate_size", type=int, default=8192)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require_free(args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    config = configuration(tokenizer, args.layers, args.hidden_size, args.intermediate_size)
    shapes = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as side, tqdm(total=len(shapes), desc="write", unit="tensor") as bar:
        tokenizer.save_pretrained(side)
        config.architectures = ["HiggsAudioV2ForConditionalGeneration"]
        config.save_pretrained(side)
        generation_defaults(config).save_pretrained(side)

        def read(name: str) -> torch.Tensor:
            bar.update()
            if len(shapes[name]) == 1:
                return torch.ones(shapes[name])
            return torch.empty(shapes[name], dtype=DTYPES[args.dtype]).normal_(std=0.02, generator=generator)

        # drawn in order, a tensor read again would be another: there are no logits to compare with
        write_model_folder(args.out, Path(side), shapes, read, DTYPES[args.dtype], logits=False)
    print(f"{total:,} parameters in {args.out}")


if __name__ == "__main__":
    main()
