"""What the commands share: flag errors as one line, logging, JAX's process-wide settings."""

import contextlib
import errno
import os
import runpy
import sys
import traceback

import jax
from absl import app, flags, logging

from omniopd_jax import config
from omniopd_jax.errors import UserError, one_of, printable
from omniopd_jax.run import recipes
from omniopd_jax.teachers import by_row
from omniopd_jax.teachers.wire import secrets

TEACHERS = "teachers."
COMMANDS = ("main", "evaluate", "export", "aot", "report", "config")


def command() -> None:
    """The console script `omniopd COMMAND ...`: the same as `python -m omniopd_jax.COMMAND ...`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        one_of(name, COMMANDS, "omniopd's command")
    except UserError as error:
        sys.exit(_tell(error))
    sys.argv[:2] = [f"omniopd {name}"]
    runpy.run_module(f"omniopd_jax.{name}", run_name="__main__", alter_sys=True)


def run(main) -> None:
    """Runs `main(argv) -> exit code` under absl; a `UserError` prints its message only, unless --verbosity=1."""
    try:
        app.run(lambda argv: sys.exit(_guarded(main, argv)), flags_parser=_parse)
    except BrokenPipeError:
        sys.exit(1)


def _guarded(main, argv) -> int:
    try:
        return main(argv) or 0
    except UserError as error:
        return _tell(error)
    except Exception as error:
        if (line := full_disk(error)) is None:
            raise
        return _tell(UserError(line))


def full_disk(error: BaseException) -> str | None:
    """One line where a full disk is at the root of an error, whoever wrapped it; else None."""
    seen = error
    for _ in range(16):
        if seen is None:
            return None
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            where = f" ({seen.filename})" if isinstance(seen, OSError) and seen.filename else ""
            return (
                f"the disk is full{where}: make room and start the same command again to go on from the last checkpoint"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _tell(error: UserError) -> int:
    if logging.get_verbosity() >= 1:
        traceback.print_exc()
    for line in str(error).splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)
    return error.exit_code


def _parse(argv):
    """absl's parser, with ml_collections' tracebacks turned into one line that names the key or the recipe."""
    argv, recipe = _with_recipe_found(argv)
    argv, named = _set_here(argv)
    sys.argv = _set_here(sys.argv)[0]  # config_flags looks for keys there, too
    try:
        with recipes.importable(recipe) if recipe else contextlib.nullcontext():
            rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            _ = flags.FLAGS["config"].value.keys()  # a recipe that failed to load says so only when it is touched
            for path, text in named:
                if path.startswith(TEACHERS):
                    by_row.set_by_flag(flags.FLAGS["config"].value, path.removeprefix(TEACHERS), text)
                else:
                    config.set_open(flags.FLAGS["config"].value, path, text)
        return rest
    except UserError as error:
        sys.exit(_tell(error))
    except flags.Error as error:
        text = str(error)
        if "Traceback" in text:  # ml_collections puts a recipe's whole traceback into the flag's message
            text = f"{_recipe(argv)}: {text.strip().splitlines()[-1]}"
        sys.exit(_tell(UserError(" ".join(text.split()))))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, ImportError, SyntaxError) as error:
        if any("verbosity=1" in a for a in argv):
            traceback.print_exc()
        sys.exit(_tell(UserError(_config_message(argv, error))))


def _with_recipe_found(argv) -> tuple[list[str], str]:
    """(argv with the recipe's path as `recipes.find` has it, that path; '' where no recipe is given)."""
    argv = list(argv)
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag not in ("-config", "--config") or (not equals and i + 1 == len(argv)):
            continue
        path, colon, variants = (value if equals else argv[i + 1]).partition(":")
        path = recipes.find(path)
        argv[i : i + 1 if equals else i + 2] = [f"--config={path}{colon}{variants}"]
        return argv, path
    return argv, ""


def _set_here(argv) -> tuple[list[str], list[tuple[str, str]]]:
    """(argv without flags whose key need not be in the recipe, [(dotted key, text), ...]): --config.teachers.NAME.KEY,
    and the keys of dicts that take any (`config.OPEN`)."""
    starts = tuple(f"config.{start}" for start in (TEACHERS, *(f"{key}." for key in config.open_keys())))
    here = {i: a.lstrip("-") for i, a in enumerate(argv) if i and a.lstrip("-").startswith(starts) and "=" in a}
    pairs = (a.removeprefix("config.").partition("=") for a in here.values())
    return [a for i, a in enumerate(argv) if i not in here], [(path, text) for path, _, text in pairs]


def _recipe(argv) -> str:
    return next((a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")), "the recipe")


def _config_message(argv, error: Exception) -> str:
    known = config.default()
    for arg in argv:
        flag, _, key = arg.lstrip("-").split("=")[0].partition(".")
        if flag == "config" and key and key not in config.flat(known) and not any(o in key for o in config.OPEN):
            return config.unknown_key_message(known, key)
    recipe = _recipe(argv)
    if isinstance(error, OSError):
        path = recipe.split(":")[0]
        if not os.path.isfile(path):
            return f"--config={recipe}: no such file {path!r}; recipes of the package: {', '.join(recipes.names())}"
    file = recipe.split(":")[0].lstrip("./")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
    where = f"{recipe}, line {frames[-1].lineno}" if frames else recipe
    words = " ".join(str(error).replace("\\n", " ").split()).strip("'\"")
    return f"{where}: {words[:400]}"


def quiet_orbax() -> None:
    """Drops what Orbax prints: warnings of a checkpoint that is opened for reading, and beside the exception of a save
    that failed (a full disk) hundreds of lines of its threads. The error itself is raised.
    """

    def not_of_orbax(record) -> bool:
        return "orbax" not in record.pathname and not (record.name == "asyncio" and "orbax" in record.getMessage())

    logging.get_absl_handler().addFilter(not_of_orbax)
    before = sys.unraisablehook

    def hook(unraisable) -> None:  # TensorStore's threads report to event loops that are closed by then
        frames = traceback.extract_tb(unraisable.exc_traceback)
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not (late and all("asyncio" in frame.filename for frame in frames)):
            before(unraisable)

    sys.unraisablehook = hook


def hide_keys(record) -> bool:
    """A filter of log records: what a library logs of an address may have a key in its path. Keeps every record."""
    with contextlib.suppress(Exception):  # a record that can't be formatted is its handler's affair
        record.msg, record.args = secrets.hide_keys(record.getMessage()), ()
    return True


def setup_jax(compute_dtype: str = "float32") -> None:
    """Process-wide settings, before the first computation: products as exact as `compute_dtype` says, and the
    persistent compilation cache, which is on unless it is set to ''.

    `JAX_COMPILATION_CACHE_DIR` names the folder (default ~/.cache/omniopd_jax/xla).
    """
    logging.get_absl_handler().addFilter(hide_keys)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX write pages at INFO
        quiet_orbax()
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing, which no command needs
    if compute_dtype == "float32":  # else a GPU rounds the operands to TF32 and a TPU to bfloat16
        # not with bfloat16: splash's kernel does not compile with it
        jax.config.update("jax_default_matmul_precision", "highest")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = os.path.join(os.path.expanduser("~"), ".cache", "omniopd_jax", "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
