"""The distribution `higgs-engine`; its import package is `engine`."""

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "deepspeed>=0.19.8,<0.20",
    # A minor release may rename modules and weights of the Higgs classes, whose forward training replaces.
    "transformers>=5.23,<5.24",
    "peft>=0.21,<0.22",
    # The last release. It names no torch and its extension loads in any from 2.11 on; a newer one might not.
    "torchaudio==2.11.0",
    "safetensors",
    "numpy",
    "pyyaml",
    "psutil",
    "soundfile",
    "tqdm",
    "rich",
    "tensorboard",
    "jiwer",
]

EXTRAS = {
    "flash": ["flash-attn"],  # compiles against the installed torch: pip install --no-build-isolation
    "kernels": ["liger-kernel"],  # fused norms, rotary positions and SwiGLU, on a GPU
    "lowbit": ["torchao>=0.18,<0.19"],  # float8 products; pure Python or abi3, for torch from 2.11 on
    "parquet": ["pyarrow>=14.0.1"],  # data in Parquet files
    "trackers": ["wandb", "mlflow>=3", "trackio"],  # those of report_to that are not the default
    "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyarrow>=14.0.1", "torchao>=0.18,<0.19"],
}

setup(
    name="higgs-engine",
    version="0.1.0",
    description="Fine-tuning of Higgs Audio v2 with DeepSpeed and FSDP, from a laptop to many GPU nodes",
    packages=find_packages(include=["engine", "engine.*"]),
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["higgs-engine = engine.cli:main"]},
)
