"""What stands below the options of each command's --help: lines to copy, and what no option tells."""

BELOW = {
    "train": """\
  bash launch/train.sh --config launch/recipes/lora-24gb.yaml --model_path higgs --audio_tokenizer_path higgs-codec \\
      --train_data_file my_voices/ --output_dir out
  the same with --resume auto       goes on from the newest checkpoint of out

`bash launch/train.sh` starts a process for each GPU; `higgs-engine train` is one process.
""",
    "prepare": """\
  higgs-engine prepare --train_data_file my_voices/ --out store --model_path higgs --audio_tokenizer_path higgs-codec
  then --train_data_file store      in training: it begins at once, and needs no codec

What was encoded before is not encoded again, also where an earlier start was killed.
""",
    "evaluate": """\
  a model       --model_path RUN/model --audio_tokenizer_path CODEC --eval_data_file DATA
  an adapter    --config RUN/config.yaml --lora_adapter_path RUN/lora_adapters
  a checkpoint  --checkpoint RUN/checkpoint-500      its settings are the run's, and what comes after is stronger

Without eval_data_file: what validation_split sets aside of train_data_file, as the run did. Data that are no store yet
are prepared in a folder beside the file that is written, evaluation-data.
""",
    "generate": """\
  higgs-engine generate --model_path out --text "Good morning." --out hello.wav
  higgs-engine generate --model_path higgs --audio_tokenizer_path higgs-codec --text "Good morning." \\
      --reference voice.wav --reference_text "What it says." --out hello.wav
  higgs-engine generate --model_path out --input data.json --out spoken

With --input the folder gets 00.wav, 01.wav, ..., references and targets in prompts/, and samples.jsonl with a line of
numbers for each; without a model for them word errors and voice are left out, the other scores need none.

Exit code 2: some rows could not be spoken; the table says why.
""",
    "validate": """\
  higgs-engine validate --train_data_file my_voices/ --report my_voices-report
  higgs-engine validate --train_data_file my_voices/ --show 0 --model_path higgs --audio_tokenizer_path higgs-codec

Exit code 2: there are rows that training would refuse; the report names each, and why.
""",
    "plan": """\
  higgs-engine plan --config launch/recipes/full-8x80gb-zero2.yaml --model_path higgs --gpus 8 --gpu_memory 80

Of the model only config.json is read. Exit code 2: it does not fit.
""",
    "convert": """\
  higgs-engine convert my_voices/ my_voices.json --to chatml
""",
    "consolidate": """\
  higgs-engine consolidate out/checkpoint-500 --out model
""",
    "export": """\
  higgs-engine export out/checkpoint-500 --out boson --format boson
  higgs-engine export boson --out native --format native
""",
    "merge": """\
  higgs-engine merge --lora_adapter_path out --output_path merged
""",
    "adapters": """\
  higgs-engine adapters --path out

Exit code 2: one of them is damaged.
""",
    "verify": """\
  higgs-engine verify out                    every checkpoint below it
  higgs-engine verify out/checkpoint-500
""",
    "inspect": """\
  higgs-engine inspect out/checkpoint-500
  higgs-engine inspect out/model --tensors
""",
    "convert-checkpoint": """\
  higgs-engine convert-checkpoint out/checkpoint-500 --to universal --out universal
  higgs-engine convert-checkpoint foreign --to model --base_model_path higgs --out model

Between our own backends nothing has to be converted: any run resumes any checkpoint, on any number of processes.

--to universal   a checkpoint-N for a DeepSpeed program without this engine: weights and moments, ZeRO 1 to 3, any
                 number of processes; learning rate and weight decay are the program's, not the run's
--to model       the weights of a checkpoint that DeepSpeed wrote, universal or ZeRO's shards, as a model folder; no
                 more of it can be taken, for a run goes on only where its data plan does; files that hold more than
                 DeepSpeed's own records are refused, for reading them could run any code
""",
    "doctor": """\
  bash launch/train.sh doctor
  bash launch/train.sh doctor --config run.yaml      also what its settings name: data, model, output folder

Exit code 0: training may begin; 2: something would make it fail, and each failure is followed by what to do.
""",
    "report": """\
  higgs-engine report out                    out/report.html
  higgs-engine report out-a out-b            comparison.html: numbers, curves, settings that differ, the same sentences
""",
    "demo": """\
  higgs-engine demo --recordings my_voices/

Settings of training may follow, such as --use_lora; the demo's own are in launch/recipes/demo.yaml.
""",
}
"""By command, examples first."""
