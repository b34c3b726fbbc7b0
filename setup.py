"""Packaging of skd_dist; exact versions for development and CI are in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="skd_dist",
    version="0.1.0",
    description="Distributed stagewise knowledge distillation of vision models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["skd_dist", "skd_dist.*"]),
    data_files=[("share/skd_dist/ds_configs", [str(path) for path in sorted(Path("ds_configs").glob("*.json"))])],
    install_requires=[
        "accelerate>=1.10",
        "braceexpand>=0.1.7",
        "deepspeed>=0.19.8",
        "fsspec>=2025.3",
        "mlflow>=3.17.2",
        "numpy>=2",
        "nvidia-ml-py>=12",
        "pillow>=11",
        "psutil>=6",
        "pyarrow>=18",
        "rich>=14",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "simplejpeg>=1.9",
        "timm>=1.0.22",
        "torch>=2.13.0",
        "torchvision>=0.28.0",
        "tyro>=1.0",
        "webdataset>=1.0.2",
        "xxhash>=3.5",
    ],
    extras_require={
        "remote": ["fsspec[http]>=2025.3", "s3fs>=2025.3"],
        "dev": [
            "datasets>=4",
            "fsspec[http]>=2025.3",
            "hypothesis>=6",
            "import-linter>=2.5",
            "moto[server]>=5",
            "mypy>=1.18",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.14",
            "s3fs>=2025.3",
            "torchdistill>=1.1.5",
        ],
        "hf": ["datasets>=4"],
    },
)
