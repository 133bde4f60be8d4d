"""Triton's interpreter, sped up: what it does to ``triton.language`` before a call is done once a launch.

It replaces the members of ``tl`` and ``tl.core`` by interpreted ones before a kernel runs, and again at every call of
a function inside, which finds all of them replaced: a third of the time. Checked on triton 3.6, 3.7 and 3.9.
"""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def prepare_language_once_a_launch():
    prepare = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def prepare_once(fn):
        prepared = not tl.core.is_builtin(tl.load)
        return interpreter._LangPatchScope() if prepared else prepare(everything)

    interpreter._patch_lang = prepare_once
