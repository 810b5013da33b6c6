"""The checkpoint as llama.cpp reads it, made by llama.cpp's own tools.

The library is `llama-cpp-python`; its source package also holds the converter. What it does not
know: how to do either without them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

GET = """\
pip download --no-deps --no-binary :all: llama-cpp-python
tar xf llama_cpp_python-*.tar.gz
pip install ./llama_cpp_python-*/   # compiles, some minutes
moelab bench --suite rivals --llama ./llama_cpp_python-*/"""
_KINDS = {16: 1, 8: 7, 4: 2}  # bits -> llama.cpp's number of F16, Q8_0, Q4_0
_CONVERT = """
import runpy, sys
source, script = sys.argv.pop(1), "convert_hf_to_gguf.py"
sys.path[:0] = [source, source + "/gguf-py"]
from conversion import base
# It knows tokenizers by their hash; this one is byte-level BPE split as GPT-2 does.
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = script
runpy.run_path(source + "/" + script, run_name="__main__")
"""


def missing(source: Path | None) -> str:
    """What is not here of llama.cpp; empty where all is."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed"
    if source is None:
        return "no source package of llama-cpp-python is given, which holds the converter"
    if not (source / "vendor/llama.cpp/convert_hf_to_gguf.py").is_file():
        return f"{source} holds no vendor/llama.cpp/convert_hf_to_gguf.py"
    return ""


def version() -> str:
    """Of the library."""
    return f"llama-cpp-python {importlib.import_module('llama_cpp').__version__}"


def convert(checkpoint: Path, folder: Path, source: Path) -> dict[int, Path]:
    """Bits -> GGUF file at F16, Q8_0 and Q4_0; those that are there stay.

    Raises
    ------
    RuntimeError
        A tool failed; the message ends with what it said.
    """
    files = {bits: folder / f"model-{bits}.gguf" for bits in _KINDS}
    if not files[16].is_file():
        part = files[16].with_suffix(".part")
        where = str((source / "vendor/llama.cpp").resolve())
        command = [sys.executable, "-c", _CONVERT, where, str(checkpoint), "--outfile", str(part)]
        done = subprocess.run(  # noqa: S603
            [*command, "--outtype", "f16"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"llama.cpp's converter failed: {done.stderr[-800:]}")
        part.replace(files[16])
    for bits in (8, 4):
        if not files[bits].is_file():
            _quantise(files[16], files[bits], _KINDS[bits])
    return files


def _quantise(source: Path, target: Path, kind: int) -> None:
    c = importlib.import_module("llama_cpp")  # asked for by whoever runs this

    quiet = c.llama_log_callback(lambda _level, _text, _data: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    part = target.with_suffix(".part")
    how = c.llama_model_quantize_default_params()
    how.ftype, how.nthread = kind, os.cpu_count() or 1
    if code := c.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp's quantiser returned {code} for {target.name}")
    part.replace(target)
